#include "base/autograd.hpp"

#include <ATen/ops/zeros.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <algorithm>
#include <stdexcept>

#include "base/postponed.hpp"
#include "base/trace_range.hpp"

namespace upcycle {
namespace {

struct RecordedOp final : torch::autograd::Node {
  Backward backward;
  std::string recorded_in;   ///< the ranges around the forward, where a profiler listens
  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
    const Unrecorded guard;
    const TraceRange range(recorded_in);
    if (!backward) throw std::logic_error("backward ran twice through one graph");
    const Backward once = std::move(backward);
    backward = nullptr;
    return once({gradients.begin(), gradients.end()});
  }
  void release_variables() override { backward = nullptr; }
};

class Recorded {
 public:
  Recorded() : before_(c10::GradMode::is_enabled()) { c10::GradMode::set_enabled(true); }
  ~Recorded() { c10::GradMode::set_enabled(before_); }

 private:
  bool before_;
};

c10::StorageImpl& storage_of(const Tensor& x) { return *x.storage().unsafeGetStorageImpl(); }

void give_back(const Tensor& x) {
  storage_of(x).set_data_ptr_noswap(at::DataPtr(nullptr, x.device()));
  storage_of(x).set_nbytes(0);
}

/// Moves the memory of `fresh` under `x` and everything that shares its storage.
void take_over(const Tensor& x, const Tensor& fresh) {
  if (fresh.sizes() != x.sizes() || fresh.strides() != x.strides() || fresh.scalar_type() != x.scalar_type() || fresh.storage_offset() != 0) {
    throw std::logic_error("a tensor that was to be computed again came out another");
  }
  const size_t bytes = storage_of(fresh).nbytes();
  storage_of(x).set_data_ptr_noswap(storage_of(fresh).set_data_ptr(at::DataPtr(nullptr, x.device())));
  storage_of(fresh).set_nbytes(0);
  storage_of(x).set_nbytes(bytes);
}

}  // namespace

bool recording() { return c10::GradMode::is_enabled(); }

std::vector<Tensor> record(std::vector<Tensor> outputs, const std::vector<Tensor>& inputs, Backward backward) {
  if (!recording()) return outputs;
  const auto node = std::make_shared<RecordedOp>();
  node->backward = std::move(backward);
  node->recorded_in = TraceRange::here();
  node->set_next_edges(torch::autograd::collect_next_edges(inputs));
  for (Tensor& output : outputs) {
    output = output.detach();  // another tensor on the same storage: what `backward` keeps does not hold this node
    torch::autograd::set_history(output, node);
  }
  return outputs;
}

Tensor record(Tensor output, const std::vector<Tensor>& inputs, Backward backward) {
  return record(std::vector<Tensor>{std::move(output)}, inputs, std::move(backward))[0];
}

GraphEnd::GraphEnd(const Tensor& output) : edge_(torch::autograd::impl::gradient_edge(output)) {}

void GraphEnd::backward(const Tensor& gradient) {
  const torch::autograd::Edge end = std::exchange(edge_, {});
  if (!end.is_valid()) throw std::logic_error("backward from a tensor that has no graph, or from one graph twice");
  try {
    torch::autograd::Engine::get_default_engine().execute({end}, {gradient}, /*keep_graph=*/false, /*create_graph=*/false,
                                                          /*accumulate_grad=*/true);
    Postponed::finish();
  } catch (...) {
    Postponed::drop();
    throw;
  }
}

Tensor recomputed(Tensor output, const std::vector<Tensor>& inputs, std::function<Tensor(const std::vector<Tensor>& inputs)> again) {
  std::vector<Tensor> kept;
  for (const Tensor& input : inputs) kept.push_back(input.detach());
  const auto backward = [kept, again = std::move(again), sizes = output.sizes().vec(), options = output.options()](const std::vector<Tensor>& d) {
    std::vector<Tensor> leaves;
    for (const Tensor& input : kept) leaves.push_back(input.detach().requires_grad_());
    Tensor y;
    {
      const Recorded guard;
      y = again(leaves);
    }
    torch::autograd::backward({y}, {d[0].defined() ? d[0] : at::zeros(sizes, options)});
    Gradients gradients;
    for (const Tensor& leaf : leaves) gradients.push_back(leaf.grad());
    return gradients;
  };
  return record(std::move(output), inputs, backward);
}

void Remade::add(const Tensor& value, std::function<Tensor()> again) {
  if (!on_) return;
  const auto same = [&](const Value& other) { return other.tensor.is_alias_of(value); };
  if (std::none_of(values_.begin(), values_.end(), same)) values_.push_back({value.detach(), std::move(again)});
}

Tensor Remade::before(const Tensor& output) {
  if (!on_ || values_.empty()) return output;
  for (const Value& value : values_) give_back(value.tensor);
  return record(output, {output}, [values = std::move(values_)](const std::vector<Tensor>& d) -> Gradients {
    for (const Value& value : values) take_over(value.tensor, value.again());
    return d;
  });
}

Unrecorded::Unrecorded() : before_(c10::GradMode::is_enabled()) { c10::GradMode::set_enabled(false); }
Unrecorded::~Unrecorded() { c10::GradMode::set_enabled(before_); }

}  // namespace upcycle
