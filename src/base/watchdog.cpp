#include "base/watchdog.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstdio>
#include <fstream>
#include <iomanip>
#include <map>

#include "base/error.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;

double now() { return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count(); }

std::string host_name() {
  std::array<char, 256> name{};
  return gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "?";
}

fs::path file_of(const fs::path& folder, int rank) {
  std::ostringstream name;
  name << "rank_" << std::setw(5) << std::setfill('0') << rank;
  return folder / name.str();
}

std::string who(const Heartbeat& beat, double now) {
  if (!beat.found) return text("rank ", beat.rank, " (no heartbeat)");
  std::ostringstream out;
  out << "rank " << beat.rank << " (" << beat.host << ", pid " << beat.pid << ", step " << beat.step << ", "
      << beat.doing << ", last progress " << std::fixed << std::setprecision(1) << now - beat.progress << " s ago)";
  return out.str();
}

std::string list(const std::vector<const Heartbeat*>& beats, double now) {
  constexpr size_t kShown = 8;
  std::string names;
  for (size_t i = 0; i < std::min(beats.size(), kShown); ++i) names += (i ? ", " : "") + who(*beats[i], now);
  if (beats.size() > kShown) names += text(" and ", beats.size() - kShown, " more");
  return names;
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
    beat.host = fields.at("host");
    beat.pid = std::stoll(fields.at("pid"));
    beat.step = std::stoll(fields.at("step"));
    beat.doing = fields.at("doing");
    beat.progress = std::stod(fields.at("progress"));
    beat.alive = std::stod(fields.at("alive"));
    beat.found = true;
  } catch (const std::exception&) {
  }
  return beat;
}

std::string accuse(const std::vector<Heartbeat>& beats, double now, double quiet_seconds) {
  std::vector<const Heartbeat*> gone, behind;
  for (const Heartbeat& beat : beats) {
    if (!beat.found || now - beat.alive > quiet_seconds) gone.push_back(&beat);
  }
  if (!gone.empty()) return text("its process is gone, stopped, or cut off from the run directory: ", list(gone, now));
  int64_t lowest = beats.front().step, highest = lowest;
  for (const Heartbeat& beat : beats) {
    lowest = std::min(lowest, beat.step);
    highest = std::max(highest, beat.step);
  }
  if (lowest < highest) {
    for (const Heartbeat& beat : beats) {
      if (beat.step == lowest) behind.push_back(&beat);
    }
    return text("behind the others, which are at step ", highest, ": ", list(behind, now));
  }
  const auto earlier = [](const Heartbeat& a, const Heartbeat& b) { return a.progress < b.progress; };
  return text("all ranks are at step ", lowest, "; the oldest heartbeat is that of ",
              who(*std::min_element(beats.begin(), beats.end(), earlier), now));
}

Watchdog::Watchdog(const fs::path& directory, int rank, int world, double timeout_seconds)
    : folder_(directory / "heartbeat"),
      rank_(rank),
      world_(world),
      timeout_(timeout_seconds),
      period_(std::clamp(timeout_seconds / 10, 0.02, 5.0)),
      progress_(now()) {
  std::error_code error;
  fs::create_directories(folder_, error);
  if (rank == 0) fs::remove(folder_ / "timed_out", error);  // an earlier run's
  write();
  if (!read_heartbeat(folder_, rank).found)
    fail(folder_.string(), ": can't write heartbeat files here; check the rights and the space");
  thread_ = std::thread([this] { look_on(); });
}

Watchdog::~Watchdog() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  wake_.notify_all();
  thread_.join();
  doing_ = "finished";
  write();
}

void Watchdog::beat(int64_t step, const char* doing) noexcept {
  step_ = step;
  doing_ = doing;
  progress_ = now();
}

void Watchdog::look_on() {
  std::unique_lock lock(mutex_);
  while (!wake_.wait_for(lock, std::chrono::duration<double>(period_), [this] { return stop_; })) {
    write();
    if (now() - progress_ > timeout_) leave();
  }
}

void Watchdog::write() const {
  // Renamed into place, so that nobody reads half of it. A full disk must not end a run that still computes: no error
  // is raised.
  const fs::path target = file_of(folder_, rank_), fresh = target.string() + ".new";
  {
    std::ofstream file(fresh, std::ios::trunc);
    file << "rank " << rank_ << "\nhost " << host_name() << "\npid " << getpid() << "\nstep " << step_ << "\ndoing "
         << doing_ << std::fixed << std::setprecision(3) << "\nprogress " << progress_ << "\nalive " << now() << '\n';
    if (!file.flush()) return;
  }
  std::error_code error;
  fs::rename(fresh, target, error);
}

void Watchdog::leave() const {
  // All ranks come here at about the same time: the first to make the file speaks, the others give it time to be heard.
  const int file = open((folder_ / "timed_out").c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 0644);
  if (file < 0 && errno == EEXIST) {
    std::this_thread::sleep_for(std::chrono::duration<double>(std::clamp(timeout_, 0.5, 10.0)));
    _exit(1);
  }
  std::vector<Heartbeat> beats;
  for (int rank = 0; rank < world_; ++rank) beats.push_back(read_heartbeat(folder_, rank));
  const std::string message =
      text("watchdog: rank ", rank_, " made no progress for ", timeout_, " s (step ", step_.load(), ", ", doing_.load(),
           "). ", accuse(beats, now(), 4 * period_ + 1), '\n');
  // The main thread may hold any lock; so no logger and no stdio.
  [[maybe_unused]] const ssize_t told = ::write(STDERR_FILENO, message.data(), message.size());
  if (file >= 0) [[maybe_unused]]
    const ssize_t kept = ::write(file, message.data(), message.size());
  _exit(1);
}

}  // namespace upcycle
