#include "train/pipeline.hpp"

#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <stdexcept>

#include "base/trace_range.hpp"

namespace upcycle {
namespace {

using Named = std::vector<std::pair<Action, Tensor>>;

Tensor take(Named& tensors, const Action& action) {
  const auto found = std::find_if(tensors.begin(), tensors.end(), [&](const auto& named) { return named.first == action; });
  if (found == tensors.end()) throw std::logic_error("the pipeline's timetable names a tensor that is not there");
  Tensor tensor = std::move(found->second);
  tensors.erase(found);
  return tensor;
}

}  // namespace

Pipeline::Pipeline(const Communicator& stages, const Layout& layout, std::function<Tensor()> room)
    : stages_(stages), virtual_stages_(layout.virtual_stages), chunks_(layout.chunks()), room_(std::move(room)) {}

Tensor Pipeline::train(int64_t micro_batches, const Forward& forward) {
  return run(one_forward_one_backward, micro_batches, forward);
}

Tensor Pipeline::evaluate(int64_t micro_batches, const Forward& forward) {
  const Unrecorded guard;
  return run(forward_only, micro_batches, forward);
}

Tensor Pipeline::run(PlanOf plan_of, int64_t micro_batches, const Forward& forward) {
  std::vector<Tick>& ticks = timetables_[{plan_of, micro_batches}];
  if (ticks.empty()) {
    std::vector<StagePlan> plans;
    for (int stage = 0; stage < stages_.size(); ++stage) plans.push_back(plan_of(stage, stages_.size(), virtual_stages_, micro_batches));
    ticks = timetable(plans, stages_.rank());
  }
  in_flight_.clear(), inputs_.clear(), outputs_.clear();   // a run before this one may have thrown
  loss_ = at::zeros({}, room_().options().dtype(at::kDouble));
  for (const Tick& tick : ticks) {
    for (const Action& action : tick.actions) {
      Tensor output = compute(action, forward);
      if (output.defined()) outputs_.emplace_back(action, std::move(output));
    }
    exchange(tick);
  }
  return std::exchange(loss_, {});
}

// The tensor that another stage needs; undefined where nobody does.
Tensor Pipeline::compute(const Action& action, const Forward& forward) {
  const bool first = action.chunk == 0, last = action.chunk == chunks_ - 1;
  const TraceRange range(action.pass == Pass::forward ? "forward of micro-batch" : "backward of micro-batch", action.micro_batch);
  if (action.pass == Pass::forward) {
    Tensor input;
    if (!first) input = take(inputs_, action).requires_grad_(recording());
    const Tensor output = forward(action.micro_batch, action.chunk, input);
    if (last) loss_.add_(output.detach());
    if (recording()) {
      in_flight_.emplace(std::pair(action.micro_batch, action.chunk), InFlight{input, GraphEnd(output)});
      most_in_flight_ = std::max(most_in_flight_, in_flight_.size());
    }
    return last ? Tensor() : output.detach().contiguous();
  }
  InFlight chunk = std::move(in_flight_.extract({action.micro_batch, action.chunk}).mapped());
  // A loss is a scalar: its gradient is one.
  chunk.end.backward(last ? at::ones({}, loss_.options()) : take(inputs_, action));
  return first ? Tensor() : chunk.input.grad().contiguous();
}

void Pipeline::exchange(const Tick& tick) {
  std::vector<Communicator::Message> sent, received;
  for (const Tick::Message& message : tick.sent) sent.push_back({message.peer, take(outputs_, message.action)});
  for (const Tick::Message& message : tick.received) {
    received.push_back({message.peer, room_()});
    inputs_.emplace_back(message.action, received.back().x);
  }
  stages_.send_receive(sent, received);
}

}  // namespace upcycle
