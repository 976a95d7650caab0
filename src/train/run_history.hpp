#pragma once
#include <cstdint>
#include <filesystem>
#include <limits>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <vector>

namespace upcycle {

/// What a run has told in its metrics.jsonl, over all its starts: the lines, folded. A start, and a roll-back, takes back what was told
/// of later steps than the one it goes on from: those are computed again. Numbers that are not finite, or not there, are NaN.
class RunHistory {
 public:
  static constexpr double kNone = std::numeric_limits<double>::quiet_NaN();

  struct Step {
    int64_t step = 0, tokens = 0;
    double loss = kNone, gradient_norm = kNone, tokens_per_second = kNone, seconds = 0.0;
    bool skipped = false;
    double load_max_over_mean = kNone, router_entropy = kNone;
    int64_t dead_experts = 0;
    int64_t offset = 0;   ///< where its line begins in the file
  };
  struct Validation {
    int64_t step;
    double loss;
  };
  /// Means over the layers; NaN where the line has none.
  struct Experts {
    int64_t step;
    double cosine, cosine_between, cosine_inside, distance;
  };
  struct Start {
    int64_t step;
    double seconds = 0.0;   ///< wall clock: from its end line, or, where it has none, of its steps
  };

  /// Takes in one line, which begins at byte `offset` of the file. Throws nlohmann's exceptions on what is no line of metrics.
  void add(const nlohmann::ordered_json& line, int64_t offset);
  /// Takes in all lines of `path`; none when there is no such file. A line that can't be read is left out, with a warning. Half a line at
  /// the end, left by a process that was killed, is cut off the file. Returns the file's size.
  int64_t read(const std::filesystem::path& path);

  const std::vector<Step>& steps() const noexcept { return steps_; }
  const std::vector<Validation>& validations() const noexcept { return validations_; }
  const std::vector<Experts>& experts() const noexcept { return experts_; }
  const std::vector<Start>& starts() const noexcept { return starts_; }

 private:
  std::vector<Step> steps_;
  std::vector<Validation> validations_;
  std::vector<Experts> experts_;
  std::vector<Start> starts_;
};

/// What the experts of a run did over some steps.
struct ExpertUse {
  int64_t steps = 0;
  std::vector<std::vector<double>> load;   ///< [layers with experts, experts]: share of the layer's choices; zeros when there were none
  std::vector<int64_t> dead;               ///< of each layer: experts that no token chose in all these steps
  std::vector<double> entropy;             ///< of each layer: of the router's probabilities, in nats, mean over the steps
};

/// Of all steps after the newest look at the experts in `history`, whose lines are read again from `path`: so it is the same however
/// often the run was stopped in between. Empty when there are no such steps; a line that is not there any more is left out.
ExpertUse use_since_last_look(const RunHistory& history, const std::filesystem::path& path);

}  // namespace upcycle
