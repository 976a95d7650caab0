#include "base/postponed.hpp"

#include <atomic>
#include <deque>
#include <utility>

#include "base/autograd.hpp"

namespace upcycle {
namespace {

// The threads that record and that go backward take turns: the engine orders them.
std::atomic<int64_t> exchanges_ahead = 0;
std::deque<std::function<void()>> waiting_work;

void do_first() {
  const Unrecorded guard;
  const std::function<void()> work = std::move(waiting_work.front());
  waiting_work.pop_front();
  work();
}

}  // namespace

Tensor Postponed::product_backward(std::function<void()> weight_gradient, const std::function<Tensor()>& input_gradient) {
  if (exchanges_ahead == 0) {
    weight_gradient();
    return input_gradient();
  }
  Tensor gradient = input_gradient();
  waiting_work.push_back(std::move(weight_gradient));
  while (waiting_work.size() > kMost) do_first();
  return gradient;
}

bool Postponed::waiting() { return !waiting_work.empty(); }

void Postponed::finish() {
  while (waiting()) do_first();
}

void Postponed::drop() { waiting_work.clear(); }

Postponed::Ahead::Ahead() { ++exchanges_ahead; }
Postponed::Ahead::~Ahead() { --exchanges_ahead; }

}  // namespace upcycle
