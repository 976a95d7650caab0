#include "ops/rope.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/outer.h>
#include <ATen/ops/pow.h>

#include "base/autograd.hpp"

namespace upcycle {
namespace {

// Turns by the table's angles, or back by them (the transpose of a rotation is its inverse).
Tensor turn(const Tensor& x, const RotaryTable& table, double direction) {
  const int64_t half = x.size(-1) / 2;
  const Tensor x32 = x.to(at::kFloat);
  const Tensor turned = at::cat({x32.narrow(-1, half, half).neg(), x32.narrow(-1, 0, half)}, -1);
  const Tensor cos = table.cos_SD.unsqueeze(1), sin = table.sin_SD.unsqueeze(1);  // [S, 1, D]
  return (x32 * cos).add_(turned * sin, direction).to(x.scalar_type());
}

}  // namespace

RotaryTable rotary_table(int64_t positions, int64_t head_dim, double theta, at::Device device) {
  const Unrecorded guard;
  const auto fp32 = at::TensorOptions(at::kFloat);
  // In fp32 and in this order, like transformers, so that long positions agree to the last bit; and on the CPU, for a GPU's pow
  // rounds otherwise, and position 4096 makes an angle of it.
  const Tensor frequency = at::pow(theta, at::arange(0, head_dim, 2, fp32) / static_cast<double>(head_dim)).reciprocal();
  const Tensor angle = at::outer(at::arange(positions, fp32), frequency).to(device);
  const Tensor both = at::cat({angle, angle}, -1);
  return {both.cos(), both.sin()};
}

Tensor rotate(const Tensor& x, const RotaryTable& table) {
  Tensor y;
  {
    const Unrecorded guard;
    y = turn(x, table, 1.0);
  }
  return record(y, {x}, [table](const std::vector<Tensor>& dy) -> Gradients { return {rotate_back(dy[0], table)}; });
}

Tensor rotate_back(const Tensor& dy, const RotaryTable& table) { return turn(dy, table, -1.0); }

}  // namespace upcycle
