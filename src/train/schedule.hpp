#pragma once
#include <cstdint>
#include <optional>
#include <vector>

/// The pipeline's plan as data: what each stage computes, in which order, and what moves between stages when. Pure, no ranks.
/// A micro-batch passes chunks 0, 1, ... of the model; chunk c is on stage c % stages (see Layout).
namespace upcycle {

enum class Pass { forward, backward };

/// One chunk's forward or backward of one micro-batch.
struct Action {
  Pass pass;
  int64_t micro_batch;
  int chunk;             ///< of the whole model
  bool operator==(const Action&) const = default;
};

/// What one stage does, in order; what stands in one step runs without an exchange of messages in between.
using Step = std::vector<Action>;
using StagePlan = std::vector<Step>;

/// 1F1B (Narayanan et al., 2104.04473): as few forwards as fill the pipeline, then one forward, one backward, in turns. A stage keeps
/// the activations of at most stages - stage micro-batches. With several chunks on each stage (`virtual_stages`) the interleaved form
/// in Megatron's order: micro-batches go round in groups of `stages`, the bubble shrinks by the number of chunks, and
/// 2 (stages - 1 - stage) + (virtual_stages - 1) stages + 1 chunks' activations are kept. Any number of micro-batches will do.
StagePlan one_forward_one_backward(int stage, int stages, int virtual_stages, int64_t micro_batches);

/// The same forwards without backwards.
StagePlan forward_only(int stage, int stages, int virtual_stages, int64_t micro_batches);

/// One tick of one stage: what it computes, if anything; then what it hands over and takes, all at once. The output of an action goes
/// to the stage of the next chunk (forward) or of the one before (backward).
struct Tick {
  struct Message {
    int peer;           ///< the other stage
    Action action;      ///< of a message sent: whose output it is; of one received: whose input it is
  };
  Step actions;
  std::vector<Message> sent, received;   ///< activations before gradients, so that two messages between the same two stages keep their order
};

/// The ticks of stage `stage` when all stages work their `plans` off, each step in the first tick in which all its inputs are there.
/// What is computed in a tick arrives in the same tick, and a tick computes only what arrived before it. So stages that go through
/// their ticks in order, with all messages of a tick in one call, never wait for each other in a circle, whatever the plans are.
/// Throws std::logic_error when the plans themselves are circular.
std::vector<Tick> timetable(const std::vector<StagePlan>& plans, int stage);

}  // namespace upcycle
