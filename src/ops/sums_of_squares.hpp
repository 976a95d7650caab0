#pragma once
#include <vector>

#include "base/tensor.hpp"

namespace upcycle {

/// Partial sums, [n], fp64 on their device: all together, the sum over all tensors of share times the sum of their squares. The same numbers in the
/// same order whatever the timing. Contiguous fp32 tensors of one device, at least one, and as many shares. On a GPU one launch a tensor; squares are summed
/// four by four in fp32, then in fp64.
Tensor sums_of_squares(const std::vector<Tensor>& all, const std::vector<double>& shares);

/// The plain form, by at::_foreach_norm.
Tensor sums_of_squares_written_out(const std::vector<Tensor>& all, const std::vector<double>& shares);

}  // namespace upcycle
