#pragma once
#include <functional>
#include <map>

#include "base/autograd.hpp"
#include "model/layout.hpp"
#include "parallel/communicator.hpp"
#include "train/schedule.hpp"

namespace upcycle {

/// Takes micro-batches through all chunks of the model, in the schedule's order, and their gradients back. Knows what moves between
/// stages, not what the model is.
class Pipeline {
 public:
  /// One chunk's forward of one micro-batch. `x` is the output of the chunk before (undefined for chunk 0), the result this chunk's;
  /// that of the last chunk is a loss, an fp64 scalar.
  using Forward = std::function<Tensor(int64_t micro_batch, int chunk, const Tensor& x)>;

  /// `stages`: the group along Axis::pipeline; it must outlive this. `room` makes a tensor for what another stage sends: the same
  /// shape and dtype on all.
  Pipeline(const Communicator& stages, const Layout& layout, std::function<Tensor()> room);

  /// **Collective** over the stages. Forward and backward of micro-batches 0, 1, ...; the sum of their losses, fp64 on the last stage,
  /// zero on the others. Of a chunk's output only the graph is kept once it is sent.
  Tensor train(int64_t micro_batches, const Forward& forward);
  /// **Collective** over the stages. Forward alone; nothing is recorded.
  Tensor evaluate(int64_t micro_batches, const Forward& forward);

  /// The most chunks' activations that were alive at once in train().
  size_t most_in_flight() const noexcept { return most_in_flight_; }

 private:
  using PlanOf = StagePlan (*)(int stage, int stages, int virtual_stages, int64_t micro_batches);
  struct InFlight {
    Tensor input;   ///< a leaf, whose gradient goes back; undefined for chunk 0
    GraphEnd end;
  };

  Tensor run(PlanOf plan, int64_t micro_batches, const Forward& forward);
  Tensor compute(const Action& action, const Forward& forward);
  void exchange(const Tick& tick);

  const Communicator& stages_;
  int virtual_stages_, chunks_;
  std::function<Tensor()> room_;
  std::map<std::pair<PlanOf, int64_t>, std::vector<Tick>> timetables_;

  // Of the run in progress, empty between runs. Keys: micro-batch, chunk.
  std::map<std::pair<int64_t, int>, InFlight> in_flight_;
  std::vector<std::pair<Action, Tensor>> inputs_;    ///< arrived and not yet used
  std::vector<std::pair<Action, Tensor>> outputs_;   ///< computed in this tick, to be sent
  Tensor loss_;
  size_t most_in_flight_ = 0;
};

}  // namespace upcycle
