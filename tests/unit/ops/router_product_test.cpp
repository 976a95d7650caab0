#include "ops/router_product.hpp"

#include <gtest/gtest.h>

#include "ops/linear.hpp"
#include "ops/routing.hpp"
#include "support/numbers.hpp"
#include "support/tensors.hpp"

namespace upcycle {
namespace {

// What CPUs compute must not move with the kernels for GPUs: checkpoints and layouts are compared bit for bit.
TEST(RouterProduct, IsLinearOnACpu) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    Parameter weight = trained(normal({6, 16}, 1)), same = trained(weight.value);
    const Tensor a = normal({5, 16}, 2, dtype).requires_grad_(), b = a.detach().clone().requires_grad_(), dy = normal({5, 6}, 3);
    const Tensor y = router_product(a, weight), z = linear(b, same);
    EXPECT_TRUE(same_bits(y.detach(), z.detach()));
    run_backward(y, dy);
    run_backward(z, dy);
    EXPECT_TRUE(same_bits(a.grad(), b.grad()));
    EXPECT_TRUE(same_bits(weight.main_grad, same.main_grad));
    EXPECT_FALSE(routes_in_one_pass(y));
  }
}

}  // namespace
}  // namespace upcycle
