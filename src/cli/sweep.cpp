#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "base/error.hpp"
#include "base/text_file.hpp"
#include "base/shutdown.hpp"
#include "checkpoint/durable.hpp"
#include "cli/command.hpp"
#include "cli/sweep_arms.hpp"
#include "cli/sweep_jobs.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

/// Before anything is written.
void refuse_foreign_files(const fs::path& directory) {
  if (!fs::exists(directory) || fs::is_empty(directory) || fs::exists(directory / "sweep.json") || fs::exists(directory / "calibration")) return;
  fail("sweep.directory = ", directory.string(), " holds files, but no sweep (sweep.json): name another directory");
}

void make_folders(const fs::path& directory) {
  std::error_code error;
  fs::create_directories(directory / "logs", error);
  if (error) fail("sweep.directory = ", directory.string(), " can't be made: ", error.message(), ". Name one in a directory that can be written");
}

/// What runs in `directory`: the arms by name. Another sweep's directory is refused, naming what differs; its arms stay as they are.
void claim(const SweepFile& sweep, const std::vector<SweepArm>& arms) {
  const fs::path directory = sweep.directory, list = directory / "sweep.json";
  if (fs::exists(list)) {
    const json there = json::parse(fs::exists(list) ? text_of(list) : std::string(), nullptr, /*allow_exceptions=*/false);
    if (!there.is_object()) fail(list.string(), " is damaged: move it away, and the arms that are there go on");
    const json here = json::parse(sweep_json(sweep, arms).dump());
    std::set<std::string> names;
    for (const json& arm : here["arms"]) names.insert(arm["name"]);
    for (const json& arm : there["arms"]) {
      const auto same = std::find_if(here["arms"].begin(), here["arms"].end(), [&](const json& other) { return other["name"] == arm["name"]; });
      if (same == here["arms"].end()) {
        fail("sweep.directory = ", directory.string(), " belongs to another sweep: its arm ", arm["name"].get<std::string>(), " is none of this one's. Name another directory");
      }
      if ((*same)["settings"] != arm["settings"]) {
        fail("sweep.directory = ", directory.string(), " belongs to another sweep: its arm ", arm["name"].get<std::string>(), " has the settings ",
             arm["settings"].dump(), ", here ", (*same)["settings"].dump(), ". Name another directory");
      }
    }
  }
  make_folders(directory);
  // The jobs of an array all come through here: what is there already is left alone.
  const auto write = [](const fs::path& path, const std::string& content) {
    if (!fs::exists(path) || text_of(path) != content) write_text_durably(path, content);
  };
  for (const SweepArm& arm : arms) {
    if (arm.run) write(directory / (arm.name + ".toml"), to_toml(*arm.run));
  }
  write(list, sweep_json(sweep, arms).dump(2) + "\n");
}

/// The dense model may still have to be made: by the sweep's own command.
void prepare_source(const SweepFile& sweep, bool dry_run) {
  const std::string model = read_run(sweep.base).source.model;
  if (model.empty() || fs::exists(model) || sweep.prepare.empty()) return;
  if (dry_run) fail("source.model = ", model, " is missing; the sweep makes it first, by `", sweep.prepare, "`: plan again after that");
  std::cout << text("source.model = ", model, " is missing: ", sweep.prepare, "\n") << std::flush;
  const int status = std::system(sweep.prepare.c_str());
  if (status != 0) fail("sweep.prepare = \"", sweep.prepare, "\" failed with code ", WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
  if (!fs::exists(model)) fail("sweep.prepare = \"", sweep.prepare, "\" was run, but source.model = ", model, " is still missing");
}

/// Every arm would end with Open MPI's own refusal.
void refuse_root(const SweepFile& sweep) {
  const std::string launcher = sweep.launcher.empty() ? "" : fs::path(sweep.launcher.front()).filename().string();
  if (sweep.ranks == 1 || geteuid() != 0 || (launcher != "mpirun" && launcher != "mpiexec")) return;
  if (std::getenv("OMPI_ALLOW_RUN_AS_ROOT") && std::getenv("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")) return;
  fail(launcher, " refuses to start arms of ", sweep.ranks, " ranks for root: export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1, or run the sweep as another user");
}

std::string this_program() { return fs::read_symlink("/proc/self/exe").string(); }

SweepJob job_of(const SweepFile& sweep, const std::vector<SweepArm>& arms, size_t index) {
  const fs::path directory = sweep.directory;
  SweepJob job{.arm = index, .command = {}, .log = directory / "logs" / (arms[index].name + ".log")};
  if (sweep.ranks > 1) {
    job.command = sweep.launcher;
    job.command.insert(job.command.end(), {"-n", std::to_string(sweep.ranks)});
  }
  job.command.insert(job.command.end(), {this_program(), "train", (directory / (arms[index].name + ".toml")).string()});
  return job;
}

bool done(const SweepArm& arm) { return progress_of(arm.run->run.directory).saved >= arm.steps(); }

/// FLOP/s of an arm's ranks together, from the arms that have run; else what the file says.
double teraflops_of(const SweepFile& sweep, const std::vector<SweepArm>& arms) {
  std::vector<double> rates;
  for (const SweepArm& arm : arms) {
    if (!arm.plan) continue;
    if (const auto rate = progress_of(arm.run->run.directory).tokens_per_second) rates.push_back(*rate * arm.plan->flops_per_token / 1e12);
  }
  if (rates.empty()) return sweep.teraflops;
  std::nth_element(rates.begin(), rates.begin() + static_cast<int64_t>(rates.size() / 2), rates.end());
  return rates[rates.size() / 2];
}

/// Exit codes of what failed, and what is left; says so as it comes.
class Progress {
 public:
  Progress(const SweepFile& sweep, const std::vector<SweepArm>& arms, size_t jobs) : sweep_(sweep), arms_(arms), jobs_(jobs) {}

  void started(const SweepJob& job) {
    std::cout << text("[", ++begun_, "/", jobs_, "] ", arms_[job.arm].name, ": ", progress_of(arms_[job.arm].run->run.directory).saved >= 0 ? "goes on" : "starts",
                      " (", job.log.string(), ")\n") << std::flush;
  }
  void ended(const JobEnd& end) {
    const SweepArm& arm = arms_[end.arm];
    const ArmProgress progress = progress_of(arm.run->run.directory);
    const bool saved = end.wished && end.code != kExitMistake;   // asked to stop: whatever the launcher made of code 75
    if (end.code == kExitDone && progress.saved >= arm.steps()) {
      std::cout << text(arm.name, ": done, ", static_cast<int64_t>(end.seconds), " s", progress.validation ? text(", validation loss ", *progress.validation) : "", "\n");
    } else if (end.code == kExitRequeue || saved) {
      std::cout << text(arm.name, ": stopped at step ", std::max<int64_t>(0, progress.saved), " of ", arm.steps(), "\n");
    } else {
      worst_ = std::max(worst_, end.code == kExitMistake ? kExitMistake : kExitFault);
      failed_.push_back(end.arm);
      std::cout << text(arm.name, ": failed with code ", end.code, ", after step ", std::max<int64_t>(0, progress.saved), ":\n",
                        what_went_wrong(fs::path(sweep_.directory) / "logs" / (arm.name + ".log")));
    }
    std::cout << std::flush;
  }
  const std::vector<size_t>& failed() const { return failed_; }
  int worst() const { return worst_; }

 private:
  const SweepFile& sweep_;
  const std::vector<SweepArm>& arms_;
  size_t jobs_, begun_ = 0;
  std::vector<size_t> failed_;
  int worst_ = kExitDone;
};

/// match = "time": every arm's speed, measured by a short run of its own, gives it the steps that take as long as the reference's.
void match_time(std::vector<SweepArm>& arms, const SweepFile& sweep) {
  const fs::path directory = fs::path(sweep.directory) / "calibration";
  make_folders(directory);
  SweepFile short_sweep = sweep;
  short_sweep.directory = directory.string();
  std::vector<SweepArm> short_arms = arms;
  std::vector<SweepJob> jobs;
  for (size_t i = 0; i < short_arms.size(); ++i) {
    SweepArm& arm = short_arms[i];
    if (!arm.cannot.empty()) continue;
    std::erase_if(arm.settings, [](const auto& s) { return s.first == "run.directory" || s.first == "checkpoint.every" || s.first == "validate.every"; });
    arm.settings.emplace_back("run.directory", json((directory / arm.name).string()).dump());
    arm.settings.emplace_back("validate.every", "0");
    set_steps(arm, short_sweep, sweep.calibration_steps);
    write_text_durably(directory / (arm.name + ".toml"), to_toml(*arm.run));
    if (!done(arm)) jobs.push_back(job_of(short_sweep, short_arms, i));
  }
  Progress progress(short_sweep, short_arms, jobs.size());
  if (!jobs.empty()) std::cout << text("measuring the speed of ", jobs.size(), " arms, ", sweep.calibration_steps, " steps each\n");
  run_jobs(jobs, static_cast<size_t>(sweep.at_once), [&](const SweepJob& job) { progress.started(job); }, [&](const JobEnd& end) { progress.ended(end); });
  const auto seconds_per_step = [&](size_t i) {
    const auto rate = progress_of(short_arms[i].run->run.directory).tokens_per_second;
    return rate && *rate > 0 ? std::optional(arms[i].tokens_per_step() / *rate) : std::nullopt;
  };
  for (size_t i = 0; i < arms.size(); ++i) {
    if (!arms[i].cannot.empty()) continue;
    const auto own = seconds_per_step(i);
    if (!own) {
      arms[i].cannot = text("its speed could not be measured: ", (directory / "logs" / (arms[i].name + ".log")).string());
      continue;
    }
    const auto reference = std::find_if(arms.begin(), arms.end(), [&](const SweepArm& other) {
      return other.cannot.empty() && other.run->run.seed == arms[i].run->run.seed && (other.control || !sweep.control);
    });
    if (reference == arms.end()) fail(sweep.path, ": sweep.match = \"time\" needs a control that runs");
    const auto theirs = seconds_per_step(static_cast<size_t>(reference - arms.begin()));
    if (!theirs || &*reference == &arms[i]) continue;
    set_steps(arms[i], sweep, std::max<int64_t>(1, std::llround(*theirs / *own * static_cast<double>(reference->steps()))));
  }
}

/// One job of a Slurm array for every arm.
int submit(const SweepFile& sweep, size_t arms) {
  const std::string array = text("--array=0-", arms - 1, "%", sweep.at_once), tasks = text("--ntasks=", sweep.ranks);
  const char* const script = "slurm/sweep.sbatch";
  std::cout << text("sbatch ", array, " ", tasks, " ", script, " ", sweep.path, "\n") << std::flush;
  execlp("sbatch", "sbatch", array.c_str(), tasks.c_str(), script, sweep.path.c_str(), static_cast<char*>(nullptr));
  fail("--slurm: sbatch is not here; submit the line above where it is");
}

}  // namespace

int run_sweep(const Arguments& arguments) {
  for (const char* size : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE"}) {
    if (const char* ranks = std::getenv(size); ranks && std::string(ranks) != "1") fail("sweep starts the ranks of its arms itself: run it without mpirun");
  }
  const SweepFile sweep = read_sweep(arguments.positional.at(0));
  if (!arguments.dry_run && !arguments.run_file && !arguments.slurm) refuse_root(sweep);
  prepare_source(sweep, arguments.dry_run);
  std::vector<SweepArm> arms = make_arms(sweep);
  refuse_foreign_files(sweep.directory);
  shutdown::listen("USR2");
  if (sweep.match == Match::time && !arguments.dry_run) match_time(arms, sweep);
  if (arguments.arm && *arguments.arm >= static_cast<int64_t>(arms.size())) {
    fail("--arm ", *arguments.arm, ": the sweep's arms are 0 to ", arms.size() - 1);
  }
  if (arguments.run_file) {
    if (!arguments.arm) fail("--run-file prints the run file of --arm N: name the arm");
    if (!arms[static_cast<size_t>(*arguments.arm)].cannot.empty()) fail(arms[static_cast<size_t>(*arguments.arm)].name, " can't run: ", arms[static_cast<size_t>(*arguments.arm)].cannot);
  }
  if (!arguments.json && !arguments.run_file) std::cout << sweep_table(arms, teraflops_of(sweep, arms)) << std::flush;
  if (arguments.json) std::cout << sweep_json(sweep, arms).dump(2) << "\n";
  if (arguments.dry_run) return kExitDone;
  claim(sweep, arms);
  if (arguments.run_file) {
    std::cout << (fs::path(sweep.directory) / (arms[static_cast<size_t>(*arguments.arm)].name + ".toml")).string() << "\n";
    return kExitDone;
  }
  if (arguments.slurm) return submit(sweep, arms.size());
  std::vector<SweepJob> jobs;
  size_t unable = 0, finished = 0;
  for (size_t i = 0; i < arms.size(); ++i) {
    if (arguments.arm && static_cast<size_t>(*arguments.arm) != i) continue;
    if (!arms[i].cannot.empty()) {
      ++unable;
    } else if (done(arms[i])) {
      ++finished;
    } else {
      jobs.push_back(job_of(sweep, arms, i));
    }
  }
  Progress progress(sweep, arms, jobs.size());
  const bool stopped = run_jobs(jobs, static_cast<size_t>(sweep.at_once), [&](const SweepJob& job) { progress.started(job); },
                                [&](const JobEnd& end) { progress.ended(end); });
  size_t complete = 0;
  for (const SweepArm& arm : arms) complete += arm.cannot.empty() && done(arm);
  std::string failures;
  for (const size_t arm : progress.failed()) {
    if (!done(arms[arm])) failures += (failures.empty() ? "; failed: " : ", ") + arms[arm].name;   // another job may have been at it, and be through
  }
  std::cout << text(complete, " of ", arms.size(), " arms are done (", finished, " were before)", unable ? text("; ", unable, " can't run") : "", failures,
                    "\ntools/report ", sweep.directory, " compares them\n");
  if (stopped) return kExitRequeue;
  return failures.empty() ? kExitDone : progress.worst();
}

}  // namespace upcycle
