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
  /// Backward from here, once, with all that was Postponed; the graph is freed. `gradient` has the output's shape, dtype and device.
  /// Gradients of leaves are added to their .grad.
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

/// Memory for time (Chen et al., 1604.06174), of a whole function: `output` is what `again(inputs)` gives, computed without recording.
/// Until backward only the inputs are kept; then `again` runs once more, recording, and backward goes through what it recorded. It must
/// compute the same, bit for bit, and make the same collective calls. What it adds into Parameter::main_grad is added once, as ever.
/// Call it where recording() holds.
Tensor recomputed(Tensor output, const std::vector<Tensor>& inputs, std::function<Tensor(const std::vector<Tensor>& inputs)> again);

/// The same of single tensors on the way: their memory is given back after forward, and what kept them for backward finds it filled
/// again. For tensors that cost much memory and little time.
class Remade {
 public:
  explicit Remade(bool on) : on_(on && recording()) {}

  /// `value` can be had `again`, bit for bit, from tensors that are kept, or were added before. It must own all of its memory, and nobody
  /// may read it after `before`. Added twice (a collective of one rank returns its argument), the first counts.
  void add(const Tensor& value, std::function<Tensor()> again);
  /// The end of the stretch: returns `output`, gives the memory back, and fills it before backward goes through `output`, in the order
  /// of addition. All that kept a value lies before `output` in the graph.
  Tensor before(const Tensor& output);

 private:
  struct Value {
    Tensor tensor;
    std::function<Tensor()> again;
  };
  bool on_;
  std::vector<Value> values_;
};

}  // namespace upcycle
