#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <ctime>
#include <iomanip>

#include "base/quantities.hpp"
#include "cli/check_parts.hpp"

namespace upcycle {
namespace {

/// "45 s", "12 min", "11.9 h".
std::string duration(double seconds) {
  if (seconds < 180) return text(std::fixed, std::setprecision(seconds < 10 ? 1 : 0), seconds, " s");
  if (seconds < 3 * 3600) return text(std::llround(seconds / 60), " min");
  return text(std::fixed, std::setprecision(1), seconds / 3600, " h");
}

/// Until SLURM_JOB_END_TIME (seconds since 1970), which Slurm or the batch script sets.
std::optional<double> seconds_left() {
  const char* end = std::getenv("SLURM_JOB_END_TIME");
  if (!end || std::atoll(end) <= 0) return {};
  return static_cast<double>(std::atoll(end) - std::time(nullptr));
}

}  // namespace

void weigh_time(CheckReport& report, uint64_t bytes, const TimeLimit& limit) {
  double speed = 0;   // GB/s
  for (const NodeCheck& node : report.nodes) speed += node.disk.value_or(0);
  report.seconds_left = limit.left;
  if (speed <= 0) return;
  const double save = static_cast<double>(bytes) / 1e9 / speed;
  report.seconds_to_save = save;
  const std::string what = text("a checkpoint (", gigabytes(bytes, bytes < 100'000'000 ? 3 : 1), ") takes about ", duration(save), " at the ",
                                std::setprecision(3), speed, " GB/s of all nodes");
  report.time = what;
  if (limit.left) report.time += text("; Slurm ends this job in ", duration(std::max(0.0, *limit.left)));
  if (limit.lead) report.time += text(limit.left ? ", and" : "; Slurm", " asks it to save ", duration(*limit.lead), " before the end");
  if (limit.left && save >= *limit.left) {
    report.problems.push_back(text("the time limit is shorter than a save: ", what, ", and Slurm ends this job in ", duration(std::max(0.0, *limit.left)),
                                   ": give it more time (sbatch --time), or a run.directory on a faster disk"));
    return;
  }
  if (limit.left && limit.lead && *limit.lead >= *limit.left) {
    report.notes.push_back(text("Slurm asks this job to save ", duration(*limit.lead), " before its end, and ends it in ", duration(*limit.left),
                                ": it is asked as soon as it has begun. Give it more time (sbatch --time)"));
  }
  if (limit.lead && save > *limit.lead) {
    // Slurm's clock ticks twice a minute; and a step has to be done first.
    const auto enough = static_cast<int64_t>(std::ceil((save + 60) / 60)) * 60;
    report.notes.push_back(text(what, ", but Slurm asks for it only ", duration(*limit.lead), " before it ends the job, so the last steps would be lost: give it ",
                                "longer, as in sbatch --signal=B:USR2@", enough));
  }
}

void compare_time(Check& check) {
  if (!check.setup || !check.device) return;
  // The clock and the environment of rank 0: mpirun hands Slurm's variables to nobody else.
  const std::optional<double> mine = seconds_left();
  const std::string told = check.world.broadcast(mine ? text(*mine) : "", 0);
  TimeLimit limit{.lead = check.arguments.check.save_within};
  if (!told.empty()) limit.left = std::stod(told);
  weigh_time(check.report, checkpoint_bytes(check.setup->target.architecture, compute_dtype(check.config->train.precision)).full, limit);
}

}  // namespace upcycle
