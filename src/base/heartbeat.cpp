#include "base/heartbeat.hpp"

#include <algorithm>
#include <fstream>
#include <iomanip>
#include <map>

#include "base/error.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;

fs::path file_of(const fs::path& folder, int rank) {
  return folder / text("rank_", std::setw(5), std::setfill('0'), rank);
}

double quiet(const Sighting& sighting) { return sighting.beat.quiet + sighting.unchanged; }

std::string who(const Sighting& sighting) {
  const Heartbeat& beat = sighting.beat;
  const std::string place = text("rank ", beat.rank, " (", beat.process.host, ", pid ", beat.process.pid);
  if (!beat.found) return place + ", no heartbeat yet)";
  return text(place, ", step ", beat.step, ", ", beat.doing, ", no progress for ", std::fixed, std::setprecision(1),
              quiet(sighting), " s)");
}

/// "<what>: rank 1 (...), rank 2 (...)" of those that `guilty` says; empty when there are none.
template <class Guilty>
std::string list(const std::string& what, const std::vector<Sighting>& ranks, Guilty guilty) {
  constexpr int kShown = 8;
  std::string names;
  int count = 0;
  for (const Sighting& sighting : ranks) {
    if (!guilty(sighting) || count++ >= kShown) continue;
    names += (names.empty() ? "" : ", ") + who(sighting);
  }
  if (count > kShown) names += text(" and ", count - kShown, " more");
  return names.empty() ? "" : what + ": " + names;
}

}  // namespace

Heartbeat read_heartbeat(const fs::path& folder, int rank) {
  Heartbeat beat;
  beat.rank = rank;
  std::ifstream file(file_of(folder, rank));
  std::map<std::string, std::string> fields;
  for (std::string line; std::getline(file, line);) {
    const size_t blank = line.find(' ');
    if (blank != std::string::npos) fields[line.substr(0, blank)] = line.substr(blank + 1);
  }
  try {
    beat.process = {fields.at("host"), std::stoll(fields.at("pid")), std::stoll(fields.at("started"))};
    beat.step = std::stoll(fields.at("step"));
    beat.doing = fields.at("doing");
    beat.quiet = std::stod(fields.at("quiet"));
    beat.count = std::stoll(fields.at("count"));
    if (fields.contains("ranks")) beat.ranks = std::stoi(fields["ranks"]);
    beat.life = fields["life"];
    beat.found = true;
  } catch (const std::exception&) {
  }
  return beat;
}

std::vector<Heartbeat> read_heartbeats(const fs::path& folder) {
  std::vector<Heartbeat> all = {read_heartbeat(folder, 0)};
  if (!all.front().found) return {};
  for (int rank = 1; rank < all.front().ranks; ++rank) {
    Heartbeat beat = read_heartbeat(folder, rank);
    if (beat.life != all.front().life) {
      beat = {};
      beat.rank = rank;
    }
    all.push_back(std::move(beat));
  }
  return all;
}

bool write_heartbeat(const fs::path& folder, const Heartbeat& beat) {
  const fs::path target = file_of(folder, beat.rank), fresh = target.string() + ".new";
  {
    std::ofstream file(fresh, std::ios::trunc);
    file << "rank " << beat.rank << "\nhost " << beat.process.host << "\npid " << beat.process.pid << "\nstarted "
         << beat.process.started << "\nstep " << beat.step << "\ndoing " << beat.doing << "\nquiet " << std::fixed
         << std::setprecision(3) << beat.quiet << "\ncount " << beat.count << "\nranks " << beat.ranks << "\nlife " << beat.life << '\n';
    if (!file.flush()) return false;
  }
  std::error_code error;
  fs::rename(fresh, target, error);
  return !error;
}

std::string accuse(const std::vector<Sighting>& ranks) {
  if (ranks.empty()) return "";
  const auto is = [](Life life) { return [life](const Sighting& rank) { return rank.life == life; }; };
  const auto silent = [](const Sighting& rank) {
    return rank.life == Life::unknown && (!rank.beat.found || rank.unchanged > 0);
  };
  std::string words = list("a process is gone", ranks, is(Life::gone));
  if (words.empty()) words = list("a process is stopped", ranks, is(Life::stopped));
  if (words.empty()) words = list("a process is gone, stopped, or cut off from the run directory", ranks, silent);
  if (!words.empty()) return words;
  const auto slower = [](const Sighting& a, const Sighting& b) { return a.beat.step < b.beat.step; };
  const auto [lowest, highest] = std::minmax_element(ranks.begin(), ranks.end(), slower);
  if (lowest->beat.step < highest->beat.step) {
    return list(text("behind the others, which are at step ", highest->beat.step), ranks,
                [step = lowest->beat.step](const Sighting& rank) { return rank.beat.step == step; });
  }
  const auto louder = [](const Sighting& a, const Sighting& b) { return quiet(a) < quiet(b); };
  return text("all ranks are at step ", lowest->beat.step, "; quiet for longest: ",
              who(*std::max_element(ranks.begin(), ranks.end(), louder)));
}

}  // namespace upcycle
