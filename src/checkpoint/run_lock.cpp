#include "checkpoint/run_lock.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <ctime>
#include <nlohmann/json.hpp>
#include <thread>
#include <tuple>

#include "base/error.hpp"
#include "base/heartbeat.hpp"
#include "base/log.hpp"
#include "base/process.hpp"

namespace upcycle {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;
using Seconds = std::chrono::duration<double>;

std::string environment(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}

/// Who takes the lock. `job` and `start` tell a requeued Slurm job from another one.
json myself() {
  const std::time_t now = std::time(nullptr);
  char since[32] = {};
  std::strftime(since, sizeof since, "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  return {{"host", host_name()},
          {"pid", ::getpid()},
          {"since", since},
          {"job", environment("SLURM_JOB_ID", "")},
          {"start", std::atoi(environment("SLURM_RESTART_COUNT", "0").c_str())}};
}

json read_holder(const FileDescriptor& file) {
  std::string content(4096, '\0');
  const ssize_t size = ::pread(file.get(), content.data(), content.size(), 0);
  content.resize(size > 0 ? static_cast<size_t>(size) : 0);
  const json holder = json::parse(content, nullptr, false);
  const json expected = myself();  // the same keys with the same kinds, or it is not ours to understand
  for (const auto& [key, value] : expected.items()) {
    if (!holder.is_object() || !holder.contains(key) || holder[key].is_string() != value.is_string())
      return json::object();
  }
  return holder;
}

std::chrono::seconds age(const FileDescriptor& file) {
  struct stat info {};
  ::fstat(file.get(), &info);
  return std::chrono::seconds(std::time(nullptr) - info.st_mtime);
}

/// A Slurm job that was requeued: Slurm has ended its earlier start.
bool same_job_started_again(const json& holder, const json& me) {
  const auto& job = me["job"].get_ref<const std::string&>();
  return !job.empty() && holder.value("job", "") == job && holder.value("start", 0) < me["start"].get<int>();
}

/// The holder's newest heartbeat; one that was not found when that in the directory is another process's.
Heartbeat heartbeat_of(const fs::path& directory, const json& holder) {
  Heartbeat beat = read_heartbeat(directory / "heartbeat", 0);
  if (beat.process.host != holder.value("host", "") || beat.process.pid != holder.value("pid", int64_t{0})) return {};
  return beat;
}

std::string describe(const fs::path& directory, const json& holder) {
  const json pid = holder.value("pid", json("unknown"));
  const std::string job = holder.value("job", "");
  const Heartbeat beat = heartbeat_of(directory, holder);
  return text("process ", pid.dump(), " on host ", holder.value("host", "unknown"),
              job.empty() ? "" : text(" (Slurm job ", job, ")"), ", since ", holder.value("since", "unknown"),
              beat.found ? text(", whose last heartbeat says: step ", beat.step, ", ", beat.doing) : ", without a heartbeat");
}

[[noreturn]] void refuse(const fs::path& directory, const json& holder, const std::string& advice) {
  fail(directory.string(), ": another job runs in this directory: ", describe(directory, holder), ". ", advice,
       ", or choose another run.directory");
}

/// Returns when the holder, of another host, gave no sign of life for as long as `proof`, or has given the lock back.
/// Throws UserError as soon as it gives one. By this host's clock alone; `file`: the lock.
void wait_for_proof(const fs::path& directory, const FileDescriptor& file, const json& holder, Seconds proof) {
  const auto signs = [&] {
    struct stat info {};
    ::fstat(file.get(), &info);
    const Heartbeat beat = heartbeat_of(directory, holder);
    return std::make_tuple(info.st_mtim.tv_sec, info.st_mtim.tv_nsec, beat.life, beat.count);
  };
  const auto before = signs();
  log::info(text(directory.string(), ": the lock is held by ", describe(directory, holder), "; looking for ", proof.count(),
                 " s whether it is alive"));
  const auto end = std::chrono::steady_clock::now() + proof;
  while (std::chrono::steady_clock::now() < end) {
    std::this_thread::sleep_for(std::min<Seconds>(Seconds(0.5), proof / 8));
    if (RunLock::is_free(directory)) return;
    if (signs() != before) refuse(directory, holder, "It is alive. Stop that job");
  }
  log::warning(text(directory.string(), ": ", describe(directory, holder), " gave no sign of life for ", proof.count(),
                    " s: it is dead, and its lock is taken over"));
}

/// Another job may have put a lock of its own in the place of one whose holder was dead.
bool is_in_place(const FileDescriptor& file, const fs::path& path) {
  struct stat here {}, there {};
  return ::fstat(file.get(), &here) == 0 && ::stat(path.c_str(), &there) == 0 && here.st_dev == there.st_dev &&
         here.st_ino == there.st_ino;
}

FileDescriptor open_lock(const fs::path& path) {
  FileDescriptor file(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644));
  if (!file) fail_with_errno("opening", path);
  return file;
}

}  // namespace

RunLock::RunLock(const fs::path& run_directory, Seconds proof) {
  const fs::path path = run_directory / "lock";
  make_directories(run_directory);
  const json me = myself();
  bool taken_over = false;
  for (;;) {
    FileDescriptor file = open_lock(path);
    const json holder = read_holder(file);
    const auto held = [&] { return ::flock(file.get(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK; };
    const bool elsewhere = holder.contains("host") && holder["host"] != me["host"];
    const bool was_held = held();
    if (was_held && !elsewhere) refuse(run_directory, holder, "Stop that job");   // this kernel knows that it lives
    if (elsewhere && !same_job_started_again(holder, me)) {
      if (heartbeat_of(run_directory, holder).found) {
        wait_for_proof(run_directory, file, holder, proof);
        taken_over = true;
      } else if (was_held || age(file) < kStale) {
        refuse(run_directory, holder, text("Stop that job; if it is dead, wait ", kStale.count(), " minutes or remove ", path.string()));
      }
    }
    if (!is_in_place(file, path)) continue;
    if (was_held && held()) {   // by a file server, for a host that is gone
      ::unlink(path.c_str());
      taken_over = true;
      continue;
    }
    const std::string content = me.dump() + "\n";
    if (::ftruncate(file.get(), 0) != 0) fail_with_errno("writing", path);
    write_at(file, std::as_bytes(std::span(content)), 0, path);
    if (taken_over) {   // two jobs may have waited for the same dead one, on hosts that don't see each other's flock
      std::this_thread::sleep_for(std::min<Seconds>(Seconds(2), proof / 4));
      const FileDescriptor again = open_lock(path);
      if (!is_in_place(file, path) || read_holder(again) != me) continue;
    }
    file_ = std::move(file);
    return;
  }
}

RunLock::~RunLock() {
  // Emptied, not removed: a process that has the removed file open and one that makes a new one would both hold "the"
  // lock.
  if (file_ && ::ftruncate(file_.get(), 0) != 0) return;
}

void RunLock::touch() const noexcept { ::futimens(file_.get(), nullptr); }

bool RunLock::is_free(const fs::path& run_directory) {
  struct stat info {};
  return ::stat((run_directory / "lock").c_str(), &info) != 0 || info.st_size == 0;
}

}  // namespace upcycle
