#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>

#include <stdexcept>
#include <vector>

#include "base/autograd.hpp"
#include "base/box.hpp"
#include "ops/parameter.hpp"

namespace upcycle {

/// Standard normal numbers, the same for the same seed on every machine; CPU.
inline Tensor normal(const Shape& shape, uint64_t seed, at::ScalarType dtype = at::kFloat) {
  return at::randn(shape, at::detail::createCPUGenerator(seed), at::TensorOptions(at::kFloat)).to(dtype);
}

/// A weight with master and a zeroed gradient, as Weights::allocate makes them.
inline Parameter trained(const Tensor& value) {
  const Tensor master = value.to(at::kFloat);
  return {value, master, at::zeros(value.sizes(), master.options()), 0};
}

/// ||a - b|| / ||b|| in fp64 on the CPU; 0 for two equal tensors (two empty ones included). Shapes must agree.
inline double distance(const Tensor& a, const Tensor& b) {
  if (a.sizes() != b.sizes()) throw std::logic_error("tensors of different shapes are compared");
  const Tensor a64 = a.detach().cpu().to(at::kDouble), b64 = b.detach().cpu().to(at::kDouble);
  if (a64.equal(b64)) return 0.0;
  return (a64 - b64).norm().item<double>() / b64.norm().item<double>();
}

/// dy through the graph of y.
inline void run_backward(const Tensor& y, const Tensor& dy) { GraphEnd(y).backward(dy); }

}  // namespace upcycle
