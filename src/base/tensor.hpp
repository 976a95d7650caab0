#pragma once
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>

namespace upcycle {
using at::Tensor;
}
