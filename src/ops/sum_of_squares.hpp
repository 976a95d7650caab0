#pragma once
#include <vector>

#include "base/tensor.hpp"

namespace upcycle {

/// The sum over all tensors of share times the sum of their squares, fp64 scalar on their device, one order whatever the timing. Contiguous
/// fp32 tensors of one device and as many shares; at least one, of them or of `known`. On a GPU one launch a
/// tensor and one more; squares are summed four by four in fp32, then in fp64. `known`: partial sums (fp64, any number) that are added as they are.
Tensor sum_of_squares(const std::vector<Tensor>& all, const std::vector<double>& shares, const std::vector<Tensor>& known = {});

/// The plain form, by at::_foreach_norm.
Tensor sum_of_squares_written_out(const std::vector<Tensor>& all, const std::vector<double>& shares);

}  // namespace upcycle
