#pragma once
#include <functional>

#include "base/tensor.hpp"

namespace upcycle {

/// Weight gradients wait for an exchange to hide: nobody needs them before the end of backward, and while ranks exchange activations
/// the processors of a GPU would idle. Backward's two halves are split so in Zero Bubble (Qi et al., 2401.10241); Megatron-LM hides its
/// tensor-parallel reductions behind the same product. One list a process, which has one backward at a time. Numbers do not change: a
/// weight's additions keep their order.
class Postponed {
 public:
  /// In the backward of a product with a weight: does both and returns `input_gradient()`. Where an exchange is ahead, `weight_gradient` is put
  /// off till then. At most `kMost` wait, for their tensors do too: the first gives way.
  static Tensor product_backward(std::function<void()> weight_gradient, const std::function<Tensor()>& input_gradient);
  static constexpr size_t kMost = 2;

  static bool waiting();
  /// Does all that waits, in its order, unrecorded. At the end of a backward, and of an exchange's once that has begun.
  static void finish();
  /// Forgets all that waits: the backward has thrown.
  static void drop();

  /// What the backward of an exchange holds from its forward on, till it has called finish(). Copies count like one.
  class Ahead {
   public:
    Ahead();
    Ahead(const Ahead&) : Ahead() {}
    Ahead& operator=(const Ahead&) = default;
    ~Ahead();
  };
};

}  // namespace upcycle
