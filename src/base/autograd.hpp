#pragma once
#include <torch/csrc/autograd/edge.h>

#include <functional>
#include <vector>

#include "base/tensor.hpp"

namespace upcycle {

/// Gradients of the inputs, in their order; an undefined tensor where an input needs none.
using Gradients = std::vector<Tensor>;
using Backward = std::function<Gradients(const std::vector<Tensor>& output_gradients)>;

/// True while a graph is being recorded; an op saves nothing for backward otherwise.
bool recording();

/// Puts one hand-written op into the autograd graph: `outputs` were computed from `inputs` without recording (see Unrecorded).
/// Returns the outputs with `backward` attached. It runs once, is freed afterwards, and may add into Parameter::main_grad; on
/// CUDA it runs on the engine's own thread, on the stream and device of the forward. Output gradients that nobody asked for come
/// as undefined tensors. The op is recorded even if no input needs a gradient (the embedding has no differentiable input).
/// `backward` may keep the raw outputs: those returned here are others, so no cycle arises. Not recording: returns `outputs`.
std::vector<Tensor> record(std::vector<Tensor> outputs, const std::vector<Tensor>& inputs, Backward backward);
Tensor record(Tensor output, const std::vector<Tensor>& inputs, Backward backward);

/// Where the graph of a computed tensor ends, without the tensor: whoever has handed the value on keeps only this.
class GraphEnd {
 public:
  /// `output` was computed while recording.
  explicit GraphEnd(const Tensor& output);
  /// Backward from here, once; the graph is freed. `gradient` has the output's shape, dtype and device. Gradients of leaves are added to
  /// their .grad.
  void backward(const Tensor& gradient);

 private:
  torch::autograd::Edge edge_;
};

/// While one lives, ATen records nothing on this thread.
class Unrecorded {
 public:
  Unrecorded();
  ~Unrecorded();
  Unrecorded(const Unrecorded&) = delete;
  Unrecorded& operator=(const Unrecorded&) = delete;

 private:
  bool before_;
};

}  // namespace upcycle
