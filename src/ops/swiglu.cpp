#include "ops/swiglu.hpp"

#include <ATen/ops/cat.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/silu_backward.h>

#include "base/autograd.hpp"

namespace upcycle {

Tensor swiglu(const Tensor& gate_up) {
  const int64_t width = gate_up.size(-1) / 2;
  Tensor y;
  {
    const Unrecorded guard;
    y = at::silu(gate_up.narrow(-1, 0, width)).mul_(gate_up.narrow(-1, width, width));
  }
  return record(y, {gate_up}, [gate_up = gate_up.detach(), width](const std::vector<Tensor>& dy) -> Gradients {
    const Tensor gate = gate_up.narrow(-1, 0, width), up = gate_up.narrow(-1, width, width);
    return {at::cat({at::silu_backward(dy[0] * up, gate), at::silu(gate).mul_(dy[0])}, -1)};
  });
}

}  // namespace upcycle
