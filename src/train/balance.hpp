#pragma once
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "config/run_config.hpp"
#include "model/stage.hpp"
#include "parallel/mesh.hpp"

// Shapes: T token rows of this rank, L layers with experts of the whole model, E experts of each.
namespace upcycle {

/// How evenly a step's tokens went to the experts.
struct ExpertLoad {
  std::vector<std::vector<int64_t>> tokens_per_expert;   ///< of every layer with experts; empty when dense
  double load_max_over_mean = 0.0;                       ///< the fullest expert against the mean, averaged over layers
  int64_t dead_experts = 0;                              ///< those that no token chose, over all layers
  int64_t dropped = 0;                                   ///< choices that found their expert full, over all layers
};
/// From Balance::counts, on the host.
ExpertLoad read_load(const Tensor& count_LX);

/// What keeps the routers of a stage in balance over a step: coefficients, statistics, biases. All of it is the same on any layout.
class Balance {
 public:
  /// The referenced objects outlive this one.
  Balance(const RunConfig&, const Mesh&, Stage&);

  /// What the routers are told of the micro-batch that begins with sample `first_sample` of the training stream.
  RouterContext context(int64_t first_sample) const;

  static constexpr int64_t kMeasures = 3;
  /// fp64 [aux, z, entropy], means over layers and the step's micro-batches, without coefficients, then the entropy of each layer with
  /// experts: this rank's part, the sum over the world is the whole.
  Tensor measures() const;
  /// **Collective.** int64 [L, E + 1] of the step's global batch, the same on all ranks: choices per expert, and, last, dropped
  /// choices. Statistics start again. Undefined for a dense model.
  Tensor counts();
  /// Moves biases against the load of `counts` and remembers it, where `applied` (bool scalar): a skipped step changes nothing.
  void update(const Tensor& count_LX, const Tensor& applied);

  /// **Collective** along pipeline. What all routers of the model remember, by layer: {"3": {"bias": [...], "count": [...]}}; empty
  /// when they remember nothing. The same on all ranks. Waits for the device.
  nlohmann::json state() const;
  /// Puts it back, bit for bit; routers of which it tells nothing remember nothing. Throws UserError when it is of another number of experts.
  void restore(const nlohmann::json& state);

 private:
  int64_t row_of(const Router&) const;
  Tensor token_rows(const Tensor& of_sequence_B, const Tensor& of_position_S) const;

  const RunConfig& config_;
  const Mesh& mesh_;
  Stage& stage_;
  std::vector<int64_t> layers_;      ///< with experts, of the whole model
};

/// The first layer whose router has a bias other than zero in a checkpoint's `training` record; -1: none.
int64_t biased_layer(const nlohmann::json& training);

}  // namespace upcycle
