#pragma once
#include <filesystem>
#include <fstream>
#include <optional>

#include "config/run_config.hpp"
#include "train/bad_steps.hpp"
#include "train/event_file.hpp"
#include "train/expert_health.hpp"
#include "train/run_history.hpp"
#include "train/run_summary.hpp"
#include "train/stragglers.hpp"
#include "train/trainer.hpp"

namespace upcycle {

/// What a run tells: metrics.jsonl has every step (README names the fields), TensorBoard's event files the same numbers where [log]
/// tensorboard asks for them, the console a line per [log] every and a summary at the end. Rank 0 only; made on the other ranks it does
/// nothing. A file that can't be written, a full disk for example, is a LonelyMistake that names it.
class Metrics {
 public:
  /// Appends to <directory>/metrics.jsonl and marks the (re)start. `hosts`: of every rank.
  Metrics(const RunConfig&, const std::filesystem::path& directory, int rank, std::vector<std::string> hosts, Scale scale, const TrainingState&);

  /// `seconds`: what the step took. `gpu_memory`: the most bytes that were in tensors of this rank's GPU so far; 0: not told.
  void step(const StepReport&, double seconds, int64_t gpu_memory = 0);
  /// This step has a line on the console.
  bool is_told(int64_t step) const;
  void validation(int64_t step, int64_t position, double loss);
  /// With what the experts did since the last such look.
  void experts(int64_t step, int64_t position, const std::vector<LayerHealth>&);
  /// The run went back to the checkpoint of `state.step` after `bad`, and goes on at `state.position`: what was told of later steps is taken back.
  void rolled_back(const TrainingState&, const BadSteps& bad);
  /// The summary. `seconds`: of wall clock, this start's; `experts`: of a layer, 0 for a dense model.
  void end(const TrainingState&, const PeakMemory&, double seconds, int64_t experts, const std::filesystem::path& checkpoint);

 private:
  void write(const nlohmann::ordered_json& line);
  void print(const StepReport&, double tokens_per_second, const std::optional<Stragglers::Slowest>&);
  const RunConfig& config_;
  Scale scale_;
  bool speaks_;
  std::filesystem::path directory_, path_;
  std::ofstream file_;
  int64_t size_ = 0;              ///< bytes of the file
  std::optional<EventFile> events_;
  RunHistory history_;            ///< over all starts
  Stragglers stragglers_;         ///< since the last line on the console
  double recent_seconds_ = -1.0;  ///< a step's seconds, averaged over the last ten or so: what the ETA believes; before the first: negative
};

}  // namespace upcycle
