#include "checkpoint/run_lock.hpp"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <ctime>
#include <nlohmann/json.hpp>

#include "base/error.hpp"

namespace upcycle {
namespace {

using nlohmann::json;

std::string host_name() {
  char name[256] = {};
  ::gethostname(name, sizeof name - 1);
  return name;
}

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

/// A holder on another host may live although flock let us in.
bool may_live_elsewhere(const json& holder, const json& me, std::chrono::seconds age) {
  const auto& job = me["job"].get_ref<const std::string&>();
  const bool same_job_started_again = !job.empty() && holder.value("job", "") == job &&
                                      holder.value("start", 0) < me["start"].get<int>();
  return holder.contains("host") && holder["host"] != me["host"] && !same_job_started_again && age < RunLock::kStale;
}

[[noreturn]] void refuse(const std::filesystem::path& directory, const json& holder, const std::string& advice) {
  const json pid = holder.value("pid", json("unknown"));
  fail(directory.string(), ": another job runs in this directory: process ", pid.dump(), " on host ",
       holder.value("host", "unknown"), ", since ", holder.value("since", "unknown"), ". ", advice,
       ", or choose another run.directory");
}

}  // namespace

RunLock::RunLock(const std::filesystem::path& run_directory) {
  const std::filesystem::path path = run_directory / "lock";
  std::error_code ignored;
  std::filesystem::create_directories(run_directory, ignored);
  FileDescriptor file(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644));
  if (!file) fail_with_errno("opening", path);
  const json me = myself(), holder = read_holder(file);
  if (::flock(file.get(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
    refuse(run_directory, holder, "Stop that job");
  if (may_live_elsewhere(holder, me, age(file))) {
    refuse(run_directory, holder,
           text("Stop that job; if it is dead, wait ", kStale.count(), " minutes or remove ", path.string()));
  }
  const std::string content = me.dump() + "\n";
  if (::ftruncate(file.get(), 0) != 0) fail_with_errno("writing", path);
  write_at(file, std::as_bytes(std::span(content)), 0, path);
  file_ = std::move(file);
}

RunLock::~RunLock() {
  // Emptied, not removed: a process that has the removed file open and one that makes a new one would both hold "the"
  // lock.
  if (file_ && ::ftruncate(file_.get(), 0) != 0) return;
}

void RunLock::touch() const noexcept { ::futimens(file_.get(), nullptr); }

}  // namespace upcycle
