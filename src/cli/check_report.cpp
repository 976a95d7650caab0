#include <algorithm>
#include <iomanip>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "base/cpu_binding.hpp"
#include "base/error.hpp"
#include "cli/check.hpp"

namespace upcycle {
namespace {

using nlohmann::ordered_json;

std::string speed(const std::optional<double>& gigabytes) {
  return gigabytes ? text(std::fixed, std::setprecision(*gigabytes < 1 ? 3 : 1), *gigabytes, " GB/s") : "-";
}

std::string counted(size_t count, const std::string& what) { return text(count, " ", what, count == 1 ? "" : "s"); }

// "4 x NVIDIA H200"; fewer than there are ranks where some share one.
std::string devices_of(const CheckReport& report, const NodeCheck& node) {
  std::map<std::string, std::set<std::string>> gpus;
  for (const int rank : node.ranks) {
    const RankCheck& check = report.ranks[static_cast<size_t>(rank)];
    if (!check.gpu.empty()) gpus[check.device].insert(check.gpu);
  }
  std::string out;
  for (const auto& [name, those] : gpus) out += text(out.empty() ? "" : ", ", those.size(), " x ", name);
  return out.empty() ? "none" : out;
}

// "0-3 | 4-7", the ranks in order; once where all have the same.
std::string cpus_of(const CheckReport& report, const NodeCheck& node) {
  constexpr size_t kShown = 4;
  std::vector<std::string> each;
  for (const int rank : node.ranks) each.push_back(ranges(report.ranks[static_cast<size_t>(rank)].cpus));
  if (std::count(each.begin(), each.end(), each.front()) == static_cast<int64_t>(each.size())) return text(each.front(), each.size() > 1 ? " each" : "");
  std::string out;
  for (size_t i = 0; i < std::min(each.size(), kShown); ++i) out += text(i == 0 ? "" : " | ", each[i]);
  return out + (each.size() > kShown ? " | ..." : "");
}

std::string table(const std::vector<std::vector<std::string>>& rows) {
  std::vector<size_t> widths(rows.front().size());
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  std::string out;
  for (const auto& row : rows) {
    for (size_t i = 0; i < row.size(); ++i) out += row[i] + (i + 1 < row.size() ? std::string(widths[i] - row[i].size() + 2, ' ') : "\n");
  }
  return out;
}

}  // namespace

std::string to_text(const CheckReport& report) {
  std::string out = text(counted(report.ranks.size(), "rank"), " on ", counted(report.nodes.size(), "node"), report.slurm.empty() ? "" : "; Slurm: " + report.slurm,
                         report.layout.empty() ? "" : "; layout: " + report.layout, "\n\n");
  std::vector<std::vector<std::string>> rows = {{"node", "ranks", "GPUs", "CPUs", "memory free", "disk", "to neighbours"}};
  for (const NodeCheck& node : report.nodes) {
    rows.push_back({node.host, ranges(node.ranks), devices_of(report, node), cpus_of(report, node),
                    text(std::fixed, std::setprecision(1), static_cast<double>(node.memory) / 1e9, " GB"), speed(node.disk), speed(node.link)});
  }
  out += table(rows) + "\n";
  if (!report.pairs.empty()) {
    out += text("neighbours, both ways at once, by ", report.transport, ":");
    for (const auto& [a, b, gigabytes] : report.pairs) out += text("  ", a, " - ", b, " ", speed(gigabytes));
    out += "\n";
  }
  if (report.all_reduce) out += text("all-reduce over all ranks, by ", report.transport, ": ", speed(report.all_reduce), " out of each\n");
  for (const std::string& line : {report.room, report.time}) out += line.empty() ? "" : line + "\n";
  for (const std::string& note : report.notes) out += "note: " + note + "\n";
  return out + text(report.problems.empty() ? "ready" : "not ready", " (", std::fixed, std::setprecision(1), report.seconds, " s)\n");
}

ordered_json to_json(const CheckReport& report) {
  const auto number = [](const std::optional<double>& value) { return value ? ordered_json(*value) : ordered_json(); };
  ordered_json ranks = ordered_json::array(), nodes = ordered_json::array(), pairs = ordered_json::array();
  for (size_t rank = 0; rank < report.ranks.size(); ++rank) {
    const RankCheck& check = report.ranks[rank];
    ranks.push_back({{"rank", rank}, {"host", check.host}, {"cpus", check.cpus}, {"device", check.device}, {"gpu", check.gpu}});
  }
  for (const NodeCheck& node : report.nodes) {
    nodes.push_back({{"host", node.host}, {"ranks", node.ranks}, {"memory", node.memory}, {"disk_gb_per_second", number(node.disk)},
                     {"link_gb_per_second", number(node.link)}});
  }
  for (const auto& [a, b, gigabytes] : report.pairs) pairs.push_back({{"nodes", {a, b}}, {"gb_per_second", gigabytes}});
  return {{"ranks", ranks},         {"nodes", nodes},           {"slurm", report.slurm},
          {"layout", report.layout}, {"transport", report.transport}, {"pairs", pairs},
          {"all_reduce_gb_per_second", number(report.all_reduce)}, {"room", report.room}, {"seconds_to_save", number(report.seconds_to_save)},
          {"seconds_left", number(report.seconds_left)}, {"notes", report.notes},
          {"problems", report.problems}, {"seconds", report.seconds}};
}

}  // namespace upcycle
