#pragma once
#include <filesystem>
#include <fstream>

#include "config/run_config.hpp"
#include "train/trainer.hpp"

namespace upcycle {

/// What a run tells: metrics.jsonl has every step (README names the fields), the console a line per [log] every. Rank 0 only;
/// made on the other ranks it does nothing.
class Metrics {
 public:
  struct Scale {
    double flops_per_token;    ///< forward and backward
    double peak_flops;         ///< of all devices together; 0: not known, no MFU is printed
  };
  /// Appends to <directory>/metrics.jsonl and marks the (re)start.
  Metrics(const RunConfig&, const std::filesystem::path& directory, int rank, int ranks, Scale scale, const TrainingState&);

  /// `seconds`: what the step took.
  void step(const StepReport&, double seconds);
  void validation(int64_t step, int64_t position, double loss);

  /// Bytes of the rank that took most: on a GPU its tensors, on a CPU the whole process; and the tensors that were planned.
  struct Memory {
    int64_t peak, planned;
    int64_t device;            ///< what a device has
  };
  void memory(int64_t step, const Memory&);

  /// For the summary at the end.
  double last_loss() const noexcept { return last_loss_; }
  double tokens_per_second() const;

 private:
  void write(const std::string& line);
  void print(const StepReport&, double tokens_per_second);

  const RunConfig& config_;
  Scale scale_;
  bool speaks_;
  std::filesystem::path path_;
  std::ofstream file_;
  double last_loss_ = 0.0, trained_seconds_ = 0.0;
  double recent_seconds_ = 0.0;   ///< a step's seconds, averaged over the last ten or so: what the ETA believes
  int64_t trained_steps_ = 0;
};

}  // namespace upcycle
