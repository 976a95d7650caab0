#pragma once
#include <ATen/core/Tensor.h>

namespace upcycle {
using at::Tensor;
}
