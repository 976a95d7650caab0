#include "cli/sweep_jobs.hpp"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <deque>
#include <fstream>
#include <map>
#include <set>
#include <string_view>
#include <thread>

#include "base/error.hpp"
#include "base/shutdown.hpp"
#include "cli/gpu_slots.hpp"

namespace upcycle {
namespace {

using Clock = std::chrono::steady_clock;

struct Running {
  size_t arm, slot;
  Clock::time_point since;
};

/// This process's environment, with `gpus` as CUDA_VISIBLE_DEVICES unless empty; without SLURM_NTASKS, which train holds its ranks against:
/// an arm takes a part of a job.
std::vector<std::string> environment_with(const std::string& gpus) {
  constexpr const char* kName = "CUDA_VISIBLE_DEVICES=";
  std::vector<std::string> lines;
  for (char** line = environ; *line; ++line) {
    const std::string_view variable(*line);
    if (variable.starts_with("SLURM_NTASKS=") || (!gpus.empty() && variable.starts_with(kName))) continue;
    lines.emplace_back(variable);
  }
  if (!gpus.empty()) lines.push_back(kName + gpus);
  return lines;
}

/// As exec wants them; the pointers are into `words`.
std::vector<char*> pointers_to(std::vector<std::string>& words) {
  std::vector<char*> pointers;
  for (std::string& word : words) pointers.push_back(word.data());
  pointers.push_back(nullptr);
  return pointers;
}

/// In the new process, between fork and exec: system calls alone, since other threads may hold locks. Does not return.
[[noreturn]] void become(const char* log, pid_t parent, const std::vector<char*>& words, const std::vector<char*>& lines) {
  setpgid(0, 0);
  // Were this process killed, the job would go on unseen and hold its run directory: it is asked to stop, as below.
  prctl(PR_SET_PDEATHSIG, SIGUSR2);
  const int nothing = open("/dev/null", O_RDONLY), out = open(log, O_WRONLY | O_CREAT | O_APPEND, 0666);
  if (getppid() == parent && nothing >= 0 && out >= 0) {
    dup2(nothing, STDIN_FILENO);
    dup2(out, STDOUT_FILENO);
    dup2(out, STDERR_FILENO);
    execvpe(words.front(), words.data(), lines.data());
    dprintf(STDERR_FILENO, "can't start %s: %s\n", words.front(), std::strerror(errno));
  }
  _exit(127);
}

/// The new process's id; 0 when there can't be one. One that can't be the job says so in its log, and ends with 127.
pid_t start(const SweepJob& job, const std::string& gpus) {
  std::vector<std::string> words = job.command, lines = environment_with(gpus);
  const std::vector<char*> arguments = pointers_to(words), environment = pointers_to(lines);
  const pid_t parent = getpid(), pid = fork();
  if (pid == 0) become(job.log.c_str(), parent, arguments, environment);
  if (pid < 0) std::ofstream(job.log, std::ios::app) << "can't start " << job.command.front() << ": " << std::strerror(errno) << "\n";
  return std::max<pid_t>(pid, 0);
}

int code_of(int status) { return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status); }

}  // namespace

bool run_jobs(const std::vector<SweepJob>& jobs, size_t at_once, const std::function<void(const SweepJob&)>& started,
              const std::function<void(const JobEnd&)>& ended) {
  std::deque<SweepJob> waiting(jobs.begin(), jobs.end());
  std::map<pid_t, Running> running;
  std::set<size_t> free_slots;
  for (size_t slot = 0; slot < at_once; ++slot) free_slots.insert(slot);
  const std::vector<std::string> gpus = visible_gpus();
  bool asked = false;
  while (!running.empty() || (!waiting.empty() && !asked)) {
    if (!asked && shutdown::requested()) {
      asked = true;
      for (const auto& [pid, job] : running) kill(pid, SIGUSR2);   // to the launcher, which hands it to its ranks
    }
    while (!asked && !waiting.empty() && running.size() < at_once) {
      const SweepJob job = std::move(waiting.front());
      waiting.pop_front();
      started(job);
      if (const pid_t pid = start(job, gpus_of_slot(gpus, at_once, *free_slots.begin()))) {
        running.emplace(pid, Running{job.arm, free_slots.extract(free_slots.begin()).value(), Clock::now()});
      } else {
        ended({job.arm, 127, 0, false});
      }
    }
    int status = 0;
    const pid_t pid = waitpid(-1, &status, WNOHANG);
    if (const auto job = running.find(pid); pid > 0 && job != running.end()) {
      const JobEnd end{job->second.arm, code_of(status), std::chrono::duration<double>(Clock::now() - job->second.since).count(), asked};
      free_slots.insert(job->second.slot);
      running.erase(job);
      ended(end);
    } else {
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
  }
  return asked;
}

std::string what_went_wrong(const std::filesystem::path& log) {
  constexpr size_t kMost = 6;
  std::ifstream file(log);
  std::vector<std::string> last, said;   // of all lines; since the program's last message
  for (std::string line; std::getline(file, line);) {
    if (line.empty() || line.starts_with("---")) continue;
    if (line.starts_with("upcycle: ") || line.starts_with("watchdog: ")) said = {line};
    else if (!said.empty() && said.size() < kMost && line.starts_with("  ")) said.push_back(line);
    last.push_back(line);
    if (last.size() > kMost) last.erase(last.begin());
  }
  std::string out;
  for (const std::string& line : said.empty() ? last : said) out += "    " + line + "\n";
  return out;
}

}  // namespace upcycle
