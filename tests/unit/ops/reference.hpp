#pragma once
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "support/numbers.hpp"

namespace upcycle {

using Op = std::function<Tensor(const std::vector<Tensor>& inputs, std::vector<Parameter>& weights)>;
using Formula = std::function<Tensor(const std::vector<Tensor>& inputs, const std::vector<Tensor>& weights)>;

struct Problem {
  std::vector<Shape> inputs;
  std::vector<Shape> weights;
  int roundings = 1;     ///< how often a bf16 result, or gradient, is rounded on its way
  double fp32 = 1e-6;    ///< relative distance to fp64
};

/// Holds `op` against `formula`, which ATen differentiates by itself in fp64 from the very same (rounded) numbers: the value,
/// the gradients of all inputs, and main_grad after two passes, forward and backward, before which it was outdated: full of NaN. In fp32 and in bf16, where each rounding
/// is at most 2^-8 of an element.
inline void expect_matches(const Problem& problem, const Op& op, const Formula& formula) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    SCOPED_TRACE(dtype == at::kFloat ? "fp32" : "bf16");
    const double bound = dtype == at::kFloat ? problem.fp32 : problem.roundings * 0x1p-8;
    std::vector<Parameter> weights;
    std::vector<Tensor> weights64;
    for (size_t i = 0; i < problem.weights.size(); ++i) {
      weights.push_back(trained(normal(problem.weights[i], 900 + i, dtype)));
      weights64.push_back(weights[i].value.to(at::kDouble).requires_grad_());
      weights[i].main_grad.fill_(NAN);
      weights[i].outdated = true;
    }
    for (uint64_t pass = 0; pass < 2; ++pass) {
      SCOPED_TRACE(testing::Message() << "pass " << pass);
      std::vector<Tensor> inputs, inputs64, before;
      for (size_t i = 0; i < problem.inputs.size(); ++i) {
        before.push_back(normal(problem.inputs[i], 10 * (i + 1) + pass, dtype));
        inputs.push_back(before[i].clone().requires_grad_());
        inputs64.push_back(before[i].to(at::kDouble).requires_grad_());
      }
      const Tensor y = op(inputs, weights), y64 = formula(inputs64, weights64);
      EXPECT_LE(distance(y, y64), bound) << "value";
      const Tensor dy = normal(y.sizes().vec(), 77 + pass, y.scalar_type());
      run_backward(y, dy);
      run_backward(y64, dy.to(at::kDouble));
      for (size_t i = 0; i < inputs.size(); ++i) {
        EXPECT_EQ(inputs[i].grad().scalar_type(), dtype);
        EXPECT_LE(distance(inputs[i].grad(), inputs64[i].grad()), bound) << "gradient of input " << i;
        EXPECT_TRUE(inputs[i].equal(before[i])) << "backward changed input " << i;
      }
    }
    for (size_t i = 0; i < weights.size(); ++i) {
      EXPECT_EQ(weights[i].main_grad.scalar_type(), at::kFloat);
      EXPECT_LE(distance(weights[i].main_grad, weights64[i].grad()), bound) << "main_grad of weight " << i;
      EXPECT_EQ(weights[i].additions, 2);
    }
  }
}

}  // namespace upcycle
