#include "train/schedule.hpp"

#include <algorithm>
#include <stdexcept>

namespace upcycle {
namespace {

// The order in which a stage's forwards or its backwards run: groups of `stages` micro-batches, each group through one chunk after
// another. The last group is always whole: a plan that lacks some micro-batches' actions is as free of circles as the whole one.
Step in_groups(Pass pass, int stage, int stages, int virtual_stages, int64_t micro_batches) {
  Step order;
  for (int64_t first = 0; first < micro_batches; first += stages) {
    for (int round = 0; round < virtual_stages; ++round) {
      const int turn = pass == Pass::forward ? round : virtual_stages - 1 - round;
      for (int64_t j = first; j < first + stages; ++j) order.push_back({pass, j, turn * stages + stage});
    }
  }
  return order;
}

StagePlan without_padding(const StagePlan& padded, int64_t micro_batches) {
  StagePlan plan;
  for (Step step : padded) {
    std::erase_if(step, [&](const Action& action) { return action.micro_batch >= micro_batches; });
    if (!step.empty()) plan.push_back(std::move(step));
  }
  return plan;
}

// What is done by all stages. The action that another one's input comes from is the same pass on the neighbouring chunk.
class Progress {
 public:
  explicit Progress(const std::vector<StagePlan>& plans) {
    for (const StagePlan& plan : plans) {
      for (const Step& step : plan) {
        for (const Action& action : step) {
          micro_batches_ = std::max(micro_batches_, action.micro_batch + 1);
          chunks_ = std::max(chunks_, action.chunk + 1);
        }
      }
    }
    done_.resize(static_cast<size_t>(2 * micro_batches_ * chunks_));
  }
  std::optional<Action> source(const Action& action) const { return neighbour(action, action.pass == Pass::forward ? -1 : 1); }
  std::optional<Action> target(const Action& action) const { return neighbour(action, action.pass == Pass::forward ? 1 : -1); }
  bool ready(const Step& step) const {
    for (auto action = step.begin(); action != step.end(); ++action) {
      const std::optional<Action> from = source(*action);
      if (from && !done_[index(*from)]) return false;
      const Action own{Pass::forward, action->micro_batch, action->chunk};
      if (action->pass == Pass::backward && !done_[index(own)] && std::find(step.begin(), action, own) == action) return false;
    }
    return true;
  }
  void finish(const Action& action) { done_[index(action)] = true; }

 private:
  std::optional<Action> neighbour(Action action, int step) const {
    action.chunk += step;
    if (action.chunk < 0 || action.chunk >= chunks_) return std::nullopt;
    return action;
  }
  size_t index(const Action& action) const {
    const int64_t pass = action.pass == Pass::backward;
    return static_cast<size_t>((pass * chunks_ + action.chunk) * micro_batches_ + action.micro_batch);
  }

  int64_t micro_batches_ = 0;
  int chunks_ = 0;
  std::vector<bool> done_;
};

}  // namespace

StagePlan one_forward_one_backward(int stage, int stages, int virtual_stages, int64_t micro_batches) {
  const Step forwards = in_groups(Pass::forward, stage, stages, virtual_stages, micro_batches);
  const Step backwards = in_groups(Pass::backward, stage, stages, virtual_stages, micro_batches);
  const int64_t behind = stages - 1 - stage;
  const int64_t fill = virtual_stages == 1 ? behind : 2 * behind + (virtual_stages - 1) * stages;
  const size_t ahead = std::min(static_cast<size_t>(fill), forwards.size());
  StagePlan plan;
  for (size_t i = 0; i < ahead; ++i) plan.push_back({forwards[i]});
  for (size_t i = 0; i < backwards.size(); ++i) {
    if (ahead + i < forwards.size()) plan.push_back({forwards[ahead + i]});
    // Plain 1F1B exchanges after each action: a gradient goes back as soon as it can. Interleaved stages, further ahead, exchange once
    // for a forward and a backward: all steps take the same time then, so that nobody waits.
    const bool pairs = virtual_stages > 1 && ahead + i < forwards.size();
    pairs ? plan.back().push_back(backwards[i]) : plan.push_back({backwards[i]});
  }
  return without_padding(plan, micro_batches);
}

StagePlan forward_only(int stage, int stages, int virtual_stages, int64_t micro_batches) {
  StagePlan plan;
  for (const Action& action : in_groups(Pass::forward, stage, stages, virtual_stages, micro_batches)) plan.push_back({action});
  return without_padding(plan, micro_batches);
}

std::vector<Tick> timetable(const std::vector<StagePlan>& plans, int stage) {
  const int stages = static_cast<int>(plans.size());
  Progress progress(plans);
  std::vector<size_t> next(plans.size());
  size_t left = 0;
  for (const StagePlan& plan : plans) left += plan.size();

  std::vector<Tick> ticks;
  while (left > 0) {
    Tick tick;
    Step finished;
    for (int s = 0; s < stages; ++s) {
      const StagePlan& plan = plans[static_cast<size_t>(s)];
      size_t& at = next[static_cast<size_t>(s)];
      if (at == plan.size() || !progress.ready(plan[at])) continue;
      const Step& step = plan[at++];
      --left;
      if (s == stage) tick.actions = step;
      for (const Action& action : step) {
        finished.push_back(action);
        const std::optional<Action> target = progress.target(action);
        if (!target) continue;
        const int to = target->chunk % stages;
        if (to == s) throw std::logic_error("a pipeline of one stage has one chunk");
        if (s == stage) tick.sent.push_back({to, action});
        if (to == stage) tick.received.push_back({s, *target});
      }
    }
    if (finished.empty()) throw std::logic_error("the pipeline's plans wait for each other in a circle");
    for (const Action& action : finished) progress.finish(action);
    for (auto* messages : {&tick.sent, &tick.received}) {
      std::stable_sort(messages->begin(), messages->end(),
                       [](const Tick::Message& a, const Tick::Message& b) { return a.action.pass < b.action.pass; });
    }
    ticks.push_back(std::move(tick));
  }
  return ticks;
}

}  // namespace upcycle
