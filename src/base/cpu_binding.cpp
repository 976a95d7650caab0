#include "base/cpu_binding.hpp"

#include <sched.h>

#include <algorithm>
#include <iterator>
#include <map>

#include "base/error.hpp"

namespace upcycle {
namespace {

std::string names(const std::vector<int>& ranks) {
  return text(ranks.size() == 1 ? "rank " : "ranks ", ranges(ranks));
}

}  // namespace

std::vector<int> bound_cpus() {
  std::vector<int> cpus;
  for (int most = 1024; most <= 1 << 20 && cpus.empty(); most *= 4) {   // the kernel refuses a set that is too small for its CPUs
    cpu_set_t* const set = CPU_ALLOC(most);
    const size_t size = CPU_ALLOC_SIZE(most);
    if (sched_getaffinity(0, size, set) == 0) {
      for (int cpu = 0; cpu < most; ++cpu) {
        if (CPU_ISSET_S(cpu, size, set)) cpus.push_back(cpu);
      }
    }
    CPU_FREE(set);
  }
  return cpus;
}

std::string ranges(const std::vector<int>& numbers) {
  std::string out;
  for (size_t begin = 0, end = 0; begin < numbers.size(); begin = end) {
    for (end = begin + 1; end < numbers.size() && numbers[end] == numbers[end - 1] + 1;) ++end;
    out += text(out.empty() ? "" : ",", numbers[begin]);
    if (end - begin > 1) out += text(end - begin > 2 ? "-" : ",", numbers[end - 1]);
  }
  return out;
}

std::vector<std::string> odd_bindings(const std::vector<RankCpus>& ranks) {
  std::map<std::vector<int>, std::vector<int>> by_cpus;
  for (const RankCpus& rank : ranks) by_cpus[rank.cpus].push_back(rank.rank);
  std::vector<std::string> lines;
  for (const auto& [cpus, those] : by_cpus) {
    if (those.size() > cpus.size()) {
      lines.push_back(text(names(those), " have ", cpus.size() == 1 ? "CPU " : "CPUs ", ranges(cpus), " together: ", those.size(), " ranks on ", cpus.size(),
                           cpus.size() == 1 ? " CPU" : " CPUs"));
    } else if (those.size() > 1 && by_cpus.size() > 1) {
      lines.push_back(text(names(those), " are bound to the same CPUs ", ranges(cpus), ", other ranks of the node to others"));
    }
  }
  for (auto a = by_cpus.begin(); a != by_cpus.end(); ++a) {
    for (auto b = std::next(a); b != by_cpus.end(); ++b) {
      std::vector<int> both;
      std::set_intersection(a->first.begin(), a->first.end(), b->first.begin(), b->first.end(), std::back_inserter(both));
      if (!both.empty()) lines.push_back(text(names(a->second), " and ", names(b->second), " overlap on CPUs ", ranges(both)));
    }
  }
  return lines;
}

}  // namespace upcycle
