#include "ops/sums_of_squares.hpp"

#include <ATen/ops/_foreach_norm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>

#include <stdexcept>

#include "base/autograd.hpp"
#include "device/stream.hpp"
#include "ops/cuda/sum_of_squares.hpp"

namespace upcycle {

Tensor sums_of_squares_written_out(const std::vector<Tensor>& all, const std::vector<double>& shares) {
  const Unrecorded guard;
  const std::vector<Tensor> norms = at::_foreach_norm(all);
  std::vector<Tensor> shared;   // scalars of the host: nothing is sent to a device
  for (size_t i = 0; i < norms.size(); ++i) shared.push_back(norms[i].to(at::kDouble).square().mul(shares[i]));
  return at::stack(shared);
}

Tensor sums_of_squares(const std::vector<Tensor>& all, const std::vector<double>& shares) {
  if (all.empty() || all.size() != shares.size()) throw std::logic_error("each tensor has a share");
  if (!all.front().is_cuda()) return sums_of_squares_written_out(all, shares);
  CUstream_st* const stream = device::current_stream(all.front().device());
  int64_t count = 0;
  for (const Tensor& x : all) count += cuda::square_sum_blocks(x.numel());
  const Tensor partials = at::empty({count}, all.front().options().dtype(at::kDouble));
  double* next = partials.mutable_data_ptr<double>();
  for (size_t i = 0; i < all.size(); ++i) {
    if (!all[i].is_contiguous()) throw std::logic_error("squares are summed over contiguous tensors");
    cuda::sum_squares({all[i].const_data_ptr<float>(), all[i].numel(), shares[i], next}, stream);
    next += cuda::square_sum_blocks(all[i].numel());
  }
  return partials;
}

}  // namespace upcycle
