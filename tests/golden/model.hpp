#pragma once
#include <ATen/ops/full.h>

#include "base/autograd.hpp"
#include "model/stage.hpp"
#include "support/numbers.hpp"
#include "train/start.hpp"

namespace upcycle {

/// A whole model in this process, in fp32 on the CPU.
class Model {
 public:
  Model(const Architecture& architecture, const Fill& fill)
      : mesh_(Grid(ParallelSection{}, world_size())), stage_(architecture, Layout::even(mesh_.grid(), architecture), mesh_) {
    stage_.weights().allocate(at::kFloat, at::kCPU);
    fill_masters(stage_.weights(), fill);
  }

  /// [T, V] of ids [B, S]; nothing is recorded.
  Tensor logits(const Tensor& ids_BS) {
    const Unrecorded guard;
    return stage_.logits(hidden(ids_BS));
  }

  /// Mean cross entropy of ids [B, S+1], each predicting the next.
  Tensor loss(const Tensor& ids) {
    const int64_t length = ids.size(1) - 1;
    const Tensor weight = at::full({ids.size(0), length}, 1.0 / static_cast<double>(ids.size(0) * length), at::TensorOptions(at::kFloat));
    return stage_.loss(hidden(ids.narrow(1, 0, length)), ids.narrow(1, 1, length), weight);
  }

  Weights& weights() { return stage_.weights(); }

 private:
  Tensor hidden(const Tensor& ids_BS) {
    return stage_.blocks(stage_.embed(ids_BS), stage_.positions(ids_BS.size(0), ids_BS.size(1)), {});
  }

  Mesh mesh_;
  Stage stage_;
};

}  // namespace upcycle
