#include "cli/roll_call.hpp"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <set>

#include "base/cpu_binding.hpp"
#include "base/error.hpp"
#include "base/lines.hpp"
#include "checkpoint/durable.hpp"
#include "cli/deadline.hpp"
#include "cli/slurm_job.hpp"
#include "config/run_config.hpp"
#include "parallel/mesh.hpp"
#include "train/agreement.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;

constexpr double kLater = 65, kFileSystem = 5;   // seconds

RollCall* living = nullptr;

/// The same for all ranks of this start, and for no other start that goes on.
std::string start_name() {
  std::string name;
  for (const char* variable : {"PMIX_NAMESPACE", "SLURM_JOB_ID", "SLURM_STEP_ID"}) {
    if (const char* value = std::getenv(variable)) name += text(name.empty() ? "" : "-", value);
  }
  std::replace(name.begin(), name.end(), '/', '-');
  return name;
}

/// The files of one start, by which ranks tell that they are there.
class Answers {
 public:
  explicit Answers(fs::path directory) : directory_(std::move(directory)), name_(start_name()) {}

  bool give(int rank) const {
    std::ofstream(path(rank)) << slurm::node_name();
    std::error_code none;
    return fs::exists(path(rank), none);
  }
  void take_back(int rank) const {
    std::error_code none;
    fs::remove(path(rank), none);
  }
  /// The node of a rank that has answered, else empty. A file that is much older than this rank's own is of an earlier start of the same name.
  std::string of(int rank, int me) const {
    std::error_code none;
    const auto theirs = fs::last_write_time(path(rank), none);
    if (none) return {};
    if (const auto mine = fs::last_write_time(path(me), none); !none && mine - theirs > std::chrono::minutes(1)) return {};
    std::string node;
    std::getline(std::ifstream(path(rank)), node);
    return node.empty() ? "an unknown node" : node;
  }

 private:
  fs::path path(int rank) const { return directory_ / text(".upcycle-check-", name_, "-rank-", rank); }
  const fs::path directory_;
  const std::string name_;
};

std::string counted(const std::vector<int>& numbers) { return text(numbers.size() == 1 ? "rank " : "ranks ", ranges(numbers)); }

[[noreturn]] void end_all(const std::string& message) {
  std::cerr << text("upcycle: ", message, "\n") << std::flush;
  std::this_thread::sleep_for(std::chrono::milliseconds(500));   // a launcher may lose what its ranks say last
  abort_all_ranks(kExitFault);
}

}  // namespace

std::string who_is_missing(const std::vector<std::string>& answered, const std::vector<std::string>& expected) {
  std::vector<int> silent;
  std::set<std::string> heard;
  bool known = expected.size() == answered.size();
  for (size_t rank = 0; rank < answered.size(); ++rank) {
    if (answered[rank].empty()) {
      silent.push_back(static_cast<int>(rank));
      continue;
    }
    heard.insert(answered[rank]);
    known = known && expected[rank] == answered[rank];
  }
  if (!known) return text(counted(silent), "; the others are on ", in_a_row({heard.begin(), heard.end()}));
  std::vector<std::string> groups;
  std::vector<int> together;
  for (size_t i = 0; i < silent.size(); ++i) {
    const std::string& node = expected[static_cast<size_t>(silent[i])];
    together.push_back(silent[i]);
    if (i + 1 < silent.size() && expected[static_cast<size_t>(silent[i + 1])] == node) continue;
    groups.push_back(text(counted(together), " (node ", node, ")"));
    together.clear();
  }
  return in_a_row(groups);
}

RollCall::RollCall(double patience, int rank, int ranks, std::function<fs::path()> directory)
    : patience_(patience), rank_(rank), ranks_(ranks), directory_(std::move(directory)) {
  living = this;
  thread_ = std::thread([this] { wait(); });
}

RollCall::~RollCall() {
  living = nullptr;
  {
    const std::lock_guard lock(mutex_);
    over_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void RollCall::met() noexcept {
  if (!living) return;
  {
    const std::lock_guard lock(living->mutex_);
    ++living->met_;
    living->patience_ = kLater;
  }
  living->changed_.notify_all();
}

bool RollCall::still_alone(std::unique_lock<std::mutex>& lock, double seconds) {
  return !changed_.wait_for(lock, std::chrono::duration<double>(seconds), [this, before = met_] { return over_ || met_ != before; });
}

double RollCall::grace() const { return std::min(5.0, patience_ / 3); }

void RollCall::wait() {
  using Seconds = std::chrono::duration<double>;
  std::unique_lock lock(mutex_);
  while (!over_) {
    const auto begin = std::chrono::steady_clock::now();
    if (!still_alone(lock, patience_)) continue;
    if (Seconds(std::chrono::steady_clock::now() - begin).count() < patience_ + grace()) {
      call(lock);
    } else if (still_alone(lock, 2 * kFileSystem)) {   // this process stood still meanwhile, and the roll is over: an answer would be left behind
      abort_all_ranks(kExitFault);
    }
  }
}

/// Returns when they have met after all.
void RollCall::call(std::unique_lock<std::mutex>& lock) {
  const double patience = patience_, grace = this->grace();
  const std::string me = text("rank ", rank_, " (node ", slurm::node_name(), ")");
  const Deadline deadline(grace + 4 * kFileSystem, text(me, ": the run directory's file system does not answer"), kExitFault);
  const fs::path directory = directory_();
  const Answers answers(directory);
  if (directory.empty() || !answers.give(rank_)) {
    if (still_alone(lock, grace)) end_all(text(me, " has waited ", patience, " s for other ranks"));
    return;
  }
  if (!still_alone(lock, grace)) return answers.take_back(rank_);
  // A lower rank speaks, or has spoken: it has removed what this rank left.
  bool heard = answers.of(rank_, rank_).empty();
  for (int lower = 0; lower < rank_ && !heard; ++lower) heard = !answers.of(lower, rank_).empty();
  if (heard) {
    if (!still_alone(lock, 2 * kFileSystem)) return answers.take_back(rank_);
    abort_all_ranks(kExitFault);
  }
  std::vector<std::string> answered;
  for (int rank = 0; rank < ranks_; ++rank) answered.push_back(answers.of(rank, rank_));
  answered[static_cast<size_t>(rank_)] = slurm::node_name();
  for (int rank = 0; rank < ranks_; ++rank) answers.take_back(rank);
  const auto silent = std::count(answered.begin(), answered.end(), "");
  if (silent == 0) {
    end_all(text("all ", ranks_, " ranks are alive, but have not come together within ", patience, " s: MPI can't connect them. Does its network ",
                 "work between these nodes?"));
  }
  end_all(text(silent, " of ", ranks_, " ranks ", silent == 1 ? "has" : "have", " not come within ", patience, " s, nor answered in ", directory.string(), ": ",
               who_is_missing(answered, slurm::nodes_of_tasks()), ". Leave their nodes out (sbatch --exclude); where nodes are only slow to start, ",
               "check --wait gives them longer"));
}

std::unique_ptr<RollCall> call_roll(const Arguments& arguments) {
  const auto launched = launched_ranks();
  if (arguments.command != "check" || !needs_mpi(arguments) || !launched || launched->ranks <= 1) return nullptr;
  const auto directory = [run_file = arguments.positional.at(0), set = arguments.set]() -> fs::path {
    try {
      return existing_part(read_run(run_file, set).run.directory);
    } catch (const std::exception&) {   // which the check itself would say, if the ranks met
      return {};
    }
  };
  return std::make_unique<RollCall>(arguments.check.wait, launched_rank(), launched->ranks, directory);
}

}  // namespace upcycle
