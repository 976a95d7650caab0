#pragma once
#include <cstdint>
#include <functional>

#include "base/tensor.hpp"

namespace upcycle {

/// A weight as the maths sees it. Weights are no autograd variables: our own backward functions add straight into `main_grad`,
/// so there is no gradient in bf16 and no extra pass over it.
struct Parameter {
  Tensor value;      ///< compute dtype (routers: fp32); what forward and backward multiply with. Elsewhere than in backward: arrived()
  Tensor master;     ///< fp32; the same storage as `value` where that is fp32; undefined when only inference is wanted
  Tensor main_grad;  ///< fp32, summed over micro-batches; undefined when nothing is trained

  /// main_grad still holds the sums of an earlier step, and the next addition takes their place: what a matrix product fills anyway, nobody
  /// need zero, nor read to add to it.
  bool outdated = false;
  /// Any number of partial sums, fp64: all together, of main_grad's squares, from the product that wrote it. Undefined where nothing did that
  /// tells, or something was added since.
  Tensor squares;
  /// For an op that can overwrite main_grad instead of adding to it: whether it must; the one who asks does so.
  bool overwrites();
  /// For any other op: main_grad, to add to.
  const Tensor& sums();

  /// Called by backward after each addition into main_grad (all micro-batches).
  void ready() {
    ++additions;
    if (added) added();
  }
  int64_t additions = 0;
  /// The value, for forward and for looking at: the current stream waits for what is still on its way from other ranks.
  const Tensor& arrived() const {
    if (before_use) before_use();
    return value;
  }

  // Of whoever sums gradients and hands out values over ranks, beside the computation; empty otherwise.
  std::function<void()> added;
  std::function<void()> before_use;
};

}  // namespace upcycle
