#include "base/watchdog.hpp"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <numeric>

#include "base/error.hpp"
#include "base/exit_code.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;
using Clock = std::chrono::steady_clock;
using Seconds = std::chrono::duration<double>;

// A whole job's last file: the first rank to make it speaks for all. Named after the job, for an earlier one's may lie about.
std::string verdict_name(const Process& first) { return text("verdict-", first.pid, "-", first.started); }

}  // namespace

Watchdog::Watchdog(int rank, std::vector<Process> job, double timeout_seconds, std::function<void()> last_act)
    : rank_(rank),
      job_(std::move(job)),
      timeout_(timeout_seconds),
      period_(std::clamp(timeout_seconds / 10, 0.02, 5.0)),
      last_act_(std::move(last_act)),
      everyone_(job_.size()) {
  std::iota(everyone_.begin(), everyone_.end(), 0);
  for (const int other : everyone_) {
    const Life life = other == rank_ ? Life::unknown : life_of(job_[static_cast<size_t>(other)]);
    if (life == Life::running || life == Life::stopped) locals_.push_back(other);
  }
  tick_ = std::min(period_, std::max(0.25, 0.02 * static_cast<double>(locals_.size())));
  thread_ = std::thread([this] { look_on(); });
}

Watchdog::~Watchdog() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
  doing_ = std::uncaught_exceptions() > 0 ? "failed" : "finished";
  if (!folder_.empty()) write();
}

void Watchdog::watch(const fs::path& directory) {
  const std::lock_guard lock(mutex_);
  const fs::path folder = directory / "heartbeat";
  std::error_code error;
  fs::create_directories(folder, error);
  verdict_ = folder / verdict_name(job_.front());
  if (rank_ == 0) {
    for (const auto& entry : fs::directory_iterator(folder, error)) {
      const std::string name = entry.path().filename().string();
      if (name.starts_with("verdict-") && name != verdict_.filename()) fs::remove(entry.path(), error);
    }
  }
  folder_ = folder;
  beat(step_, doing_);
  write();
  if (read_heartbeat(folder_, rank_).count != count_)
    fail(folder_.string(), ": can't write heartbeat files here; check the rights and the space");
}

bool Watchdog::sees(int rank, double seconds) const {
  const Process& process = job_[static_cast<size_t>(rank)];
  const auto latest = Clock::now() + Seconds(seconds);
  for (;; std::this_thread::sleep_for(Seconds(0.1))) {
    const Process writer = read_heartbeat(folder_, rank).process;
    if (writer.pid == process.pid && writer.started == process.started) return true;
    if (Clock::now() > latest) return false;
  }
}

void Watchdog::beat(int64_t step, const char* doing) noexcept {
  step_ = step;
  doing_ = doing;
  ++beats_;
}

void Watchdog::look_on() {
  std::unique_lock lock(mutex_);
  Clock::time_point before = Clock::now();
  uint64_t seen = 0;
  double unwritten = 0;
  while (!wake_.wait_for(lock, Seconds(tick_), [this] { return stop_; })) {
    // What this process has slept through, with a suspended job, is nobody's silence: hence the bound.
    const double passed = std::min(Seconds(Clock::now() - before).count(), 1 + 4 * tick_);
    before = Clock::now();
    quiet_ = seen == beats_ ? quiet_ + passed : 0;
    if (quiet_ == 0) halfway_.clear();
    seen = beats_;
    if (const std::vector<int> dead = gone(); !dead.empty()) {
      speak("", dead);
      leave();
    }
    if (folder_.empty()) continue;
    if ((unwritten += passed) >= period_) {
      unwritten = 0;
      write();
      std::error_code error;
      if (fs::exists(verdict_, error)) leave();
    }
    if (quiet_ > timeout_ / 2 && halfway_.empty()) {
      halfway_ = look_at(everyone_);
      halfway_quiet_ = quiet_;
    }
    if (quiet_ > timeout_) {
      speak(text(" after ", timeout_, " s without progress (step ", step_, ", ", doing_, ")"), everyone_);
      leave();
    }
  }
}

void Watchdog::write() {
  const Process& first = job_.front();
  write_heartbeat(folder_, {rank_, true, job_[static_cast<size_t>(rank_)], step_, doing_.load(), quiet_, ++count_,
                            static_cast<int>(job_.size()), text(first.host, '-', first.pid, '-', first.started)});
}

/// The local ranks whose process is gone although they had not finished.
std::vector<int> Watchdog::gone() const {
  std::vector<int> dead;
  for (const int rank : locals_) {
    const Process& process = job_[static_cast<size_t>(rank)];
    if (life_of(process) != Life::gone) continue;
    if (!folder_.empty()) {
      const Heartbeat last = read_heartbeat(folder_, rank);
      if (last.process.pid == process.pid && last.doing == "finished") continue;
    }
    dead.push_back(rank);
  }
  return dead;
}

std::vector<Sighting> Watchdog::look_at(const std::vector<int>& ranks) const {
  std::vector<Sighting> out;
  for (const int rank : ranks) {
    const Process& process = job_[static_cast<size_t>(rank)];
    Sighting sighting{folder_.empty() ? Heartbeat{} : read_heartbeat(folder_, rank), Life::unknown};
    // An earlier job's heartbeat is none.
    if (sighting.beat.process.pid != process.pid || sighting.beat.process.started != process.started) sighting.beat = {};
    sighting.beat.rank = rank;
    sighting.beat.process = process;
    if (rank == rank_) sighting.life = Life::running;
    if (std::binary_search(locals_.begin(), locals_.end(), rank)) sighting.life = life_of(process);
    if (!halfway_.empty() && halfway_[static_cast<size_t>(rank)].beat.count == sighting.beat.count)
      sighting.unchanged = quiet_ - halfway_quiet_;
    out.push_back(sighting);
  }
  return out;
}

void Watchdog::speak(const std::string& words, const std::vector<int>& of_whom) const {
  int file = -1;
  bool mine = true;
  if (!folder_.empty()) {
    file = open(verdict_.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0644);
    mine = file >= 0 || errno != EEXIST;
  } else {   // the lowest that lives
    for (const int rank : locals_) mine = mine && (rank > rank_ || life_of(job_[static_cast<size_t>(rank)]) != Life::running);
  }
  if (mine) {
    const std::string message = text("watchdog: rank ", rank_, " ends the job", words, ": ", accuse(look_at(of_whom)), "\n");
    // The main thread may hold any lock; so no logger and no stdio.
    [[maybe_unused]] const ssize_t told = ::write(STDERR_FILENO, message.data(), message.size());
    if (file >= 0) [[maybe_unused]]
      const ssize_t kept = ::write(file, message.data(), message.size());
    end_heedless_launcher();
  }
  // The launcher kills whoever is left when the first process leaves, and before watch() the others must not take that one for
  // the culprit. So nobody leaves before it has been said.
  const auto said = [&] {
    std::error_code error;
    return !folder_.empty() && (mine || fs::file_size(verdict_, error) > 0);
  };
  const auto latest = Clock::now() + Seconds(folder_.empty() ? 1 + 2 * tick_ : std::clamp(timeout_, 0.5, 10.0));
  while (!said() && Clock::now() < latest) std::this_thread::sleep_for(Seconds(0.05));
}

void Watchdog::leave() const {
  for (const int rank : locals_) {
    const Process& process = job_[static_cast<size_t>(rank)];
    if (life_of(process) == Life::stopped) kill(static_cast<pid_t>(process.pid), SIGKILL);
  }
  std::atomic<bool> done = !last_act_;
  try {
    if (last_act_) std::thread([&] { last_act_(), done = true; }).detach();
  } catch (const std::exception&) {
    done = true;
  }
  for (int i = 0; i < 100 && !done; ++i) std::this_thread::sleep_for(Seconds(0.05));
  _exit(kExitFault);
}

}  // namespace upcycle
