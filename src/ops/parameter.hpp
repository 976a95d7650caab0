#pragma once
#include <cstdint>

#include "base/tensor.hpp"

namespace upcycle {

/// A weight as the maths sees it. Weights are no autograd variables: our own backward functions add straight into `main_grad`,
/// so there is no gradient in bf16 and no extra pass over it.
struct Parameter {
  Tensor value;      ///< compute dtype (routers: fp32); what forward and backward multiply with
  Tensor master;     ///< fp32; the same storage as `value` where that is fp32; undefined when only inference is wanted
  Tensor main_grad;  ///< fp32, summed over micro-batches; undefined when nothing is trained

  /// Called by backward after each addition into main_grad (all micro-batches). A reducer counts them to overlap communication.
  void ready() { ++additions; }
  int64_t additions = 0;
};

}  // namespace upcycle
