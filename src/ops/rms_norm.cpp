#include "ops/rms_norm.hpp"

#include <ATen/ops/mean.h>
#include <ATen/ops/rsqrt.h>

#include "base/autograd.hpp"

namespace upcycle {

Tensor rms_norm(const Tensor& x, Parameter& weight, double eps) {
  Tensor y, scale;  // scale [..., 1] = 1 / root mean square
  {
    const Unrecorded guard;
    const Tensor x32 = x.to(at::kFloat);
    scale = x32.square().mean(-1, true).add_(eps).rsqrt_();
    y = (x32 * scale).to(x.scalar_type()).mul_(weight.arrived());
  }
  return record(y, {x}, [x = x.detach(), scale, &weight](const std::vector<Tensor>& dy) -> Gradients {
    const Tensor dy32 = dy[0].to(at::kFloat);
    const Tensor unit = x.to(at::kFloat) * scale;
    const int64_t width = x.size(-1);
    weight.main_grad.add_((dy32 * unit).reshape({-1, width}).sum(0));
    weight.ready();
    // d/dx of x * scale(x): the part of the gradient along x itself is taken out.
    const Tensor d_unit = dy32 * weight.value.to(at::kFloat);
    const Tensor along = (d_unit * unit).mean(-1, true);
    return {d_unit.sub_(unit * along).mul_(scale).to(x.scalar_type())};
  });
}

}  // namespace upcycle
