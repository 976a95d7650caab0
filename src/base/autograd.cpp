#include "base/autograd.hpp"

#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>

namespace upcycle {
namespace {

struct RecordedOp final : torch::autograd::Node {
  Backward backward;
  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
    const Unrecorded guard;
    if (!backward) throw std::logic_error("backward ran twice through one graph");
    const Backward once = std::move(backward);
    backward = nullptr;
    return once({gradients.begin(), gradients.end()});
  }
  void release_variables() override { backward = nullptr; }
};

}  // namespace

bool recording() { return c10::GradMode::is_enabled(); }

std::vector<Tensor> record(std::vector<Tensor> outputs, const std::vector<Tensor>& inputs, Backward backward) {
  if (!recording()) return outputs;
  const auto node = std::make_shared<RecordedOp>();
  node->backward = std::move(backward);
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
  torch::autograd::Engine::get_default_engine().execute({end}, {gradient}, /*keep_graph=*/false, /*create_graph=*/false,
                                                        /*accumulate_grad=*/true);
}

Unrecorded::Unrecorded() : before_(c10::GradMode::is_enabled()) { c10::GradMode::set_enabled(false); }
Unrecorded::~Unrecorded() { c10::GradMode::set_enabled(before_); }

}  // namespace upcycle
