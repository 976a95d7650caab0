#include "cli/slurm_job.hpp"

#include <charconv>
#include <cstdlib>
#include <optional>

#include "base/error.hpp"
#include "base/process.hpp"

namespace upcycle::slurm {
namespace {

constexpr size_t kMost = 100'000;   // nodes, or tasks: a list that says more is not one

std::optional<size_t> number(std::string_view digits) {
  size_t value = 0;
  const auto [rest, code] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  if (digits.empty() || code != std::errc() || rest != digits.data() + digits.size() || value > kMost) return {};
  return value;
}

/// At `separator`, but not inside of brackets.
std::vector<std::string> parts(const std::string& list, char separator) {
  std::vector<std::string> out(1);
  int depth = 0;
  for (const char c : list) {
    depth += (c == '[') - (c == ']');
    if (c == separator && depth == 0) out.emplace_back();
    else out.back() += c;
  }
  return out;
}

/// "07-10" -> 07, 08, 09, 10.
std::optional<std::vector<std::string>> numbers(const std::string& range) {
  const size_t dash = range.find('-');
  const auto first = number(range.substr(0, dash)), last = dash == std::string::npos ? first : number(range.substr(dash + 1));
  if (!first || !last || *last < *first) return {};
  const size_t digits = dash == std::string::npos ? range.size() : dash;
  std::vector<std::string> out;
  for (size_t n = *first; n <= *last; ++n) {
    const std::string plain = std::to_string(n);
    out.push_back(std::string(plain.size() < digits ? digits - plain.size() : 0, '0') + plain);
  }
  return out;
}

/// "rack[0-1]n[1-2]" -> all four; nothing where it is none.
std::vector<std::string> expanded(const std::string& item) {
  const size_t open = item.find('['), close = item.find(']');
  if (open == std::string::npos) return close == std::string::npos && !item.empty() ? std::vector<std::string>{item} : std::vector<std::string>{};
  if (close == std::string::npos || close < open) return {};
  const std::string rest = item.substr(close + 1);
  const std::vector<std::string> ends = rest.empty() ? std::vector<std::string>{""} : expanded(rest);
  std::vector<std::string> out;
  for (const std::string& range : parts(item.substr(open + 1, close - open - 1), ',')) {
    const auto all = numbers(range);
    if (!all || ends.empty() || out.size() + all->size() * ends.size() > kMost) return {};
    for (const std::string& one : *all) {
      for (const std::string& end : ends) out.push_back(item.substr(0, open) + one + end);
    }
  }
  return out;
}

std::string environment(const char* name) { return std::getenv(name) ? std::getenv(name) : ""; }

}  // namespace

std::vector<std::string> node_names(const std::string& list) {
  std::vector<std::string> out;
  for (const std::string& item : parts(list, ',')) {
    const std::vector<std::string> some = expanded(item);
    if (some.empty()) return {};
    out.insert(out.end(), some.begin(), some.end());
  }
  return out;
}

std::vector<std::string> nodes_of_tasks(const std::string& nodes, const std::string& tasks_per_node) {
  const std::vector<std::string> names = node_names(nodes);
  std::vector<std::string> out;
  size_t node = 0;
  for (const std::string& item : parts(tasks_per_node, ',')) {
    const size_t open = item.find("(x");
    const auto tasks = number(item.substr(0, open));
    const auto times = open == std::string::npos ? std::optional<size_t>(1) : item.ends_with(')') ? number(item.substr(open + 2, item.size() - open - 3)) : std::nullopt;
    if (!tasks || !times || node + *times > names.size() || out.size() + *tasks * *times > kMost) return {};
    for (size_t i = 0; i < *times; ++i) out.insert(out.end(), *tasks, names[node++]);
  }
  if (node != names.size()) return {};
  return out;
}

std::vector<std::string> nodes_of_tasks() {
  if (const std::string nodes = environment("SLURM_STEP_NODELIST"); !nodes.empty()) return nodes_of_tasks(nodes, environment("SLURM_STEP_TASKS_PER_NODE"));
  return nodes_of_tasks(environment("SLURM_JOB_NODELIST"), environment("SLURM_TASKS_PER_NODE"));
}

std::string node_name() {
  const std::string name = environment("SLURMD_NODENAME");
  return name.empty() ? host_name() : name;
}

}  // namespace upcycle::slurm
