// The half of permute.hpp that makes row orders.
#include <ATen/ops/arange.h>
#include <ATen/ops/argsort.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

#include "device/stream.hpp"
#include "ops/cuda/sort.hpp"
#include "ops/permute.hpp"

namespace upcycle {
namespace {

Tensor count_up_to(int64_t size, const Tensor& like) { return at::arange(size, like.options()); }

/// Experts of the range by their number in it; all others: `experts`. [T*K]
Tensor numbers_in_range(const Tensor& expert_TK, int64_t first, int64_t experts) {
  const Tensor number = expert_TK.reshape({-1}) - first;
  return at::where(number.ge(0).logical_and_(number.lt(experts)), number, experts);
}

/// int64 [size]: how often each number occurs. By hand, for bincount makes the host wait for a GPU.
Tensor occurrences(const Tensor& number_N, int64_t size) {
  return at::zeros({size}, number_N.options()).scatter_add_(0, number_N, at::ones_like(number_N));
}

bool kernel_takes(const Tensor& expert_TK, int64_t experts) {
  return expert_TK.is_cuda() && expert_TK.numel() < int64_t{1} << 31 && experts <= cuda::kMostSortedExperts;
}

Tensor space_for(const Tensor& expert_TK, int64_t experts) {
  return at::empty({cuda::sort_space(expert_TK.numel(), experts)}, expert_TK.options().dtype(at::kInt));
}

RowOrder sort_by_kernel(const Tensor& of, int64_t first, int64_t experts, int64_t rows, int64_t slots) {
  const Tensor expert_TK = of.contiguous(), space = space_for(of, experts);
  RowOrder order;
  order.choice_R = slots > 0 ? at::full({rows}, of.numel(), of.options()) : at::empty({rows}, of.options());
  order.row_TK = at::empty(of.sizes(), of.options());
  order.end_E = at::empty({experts}, space.options());
  cuda::sort_by_expert({expert_TK.const_data_ptr<int64_t>(), of.numel(), first, experts, space.mutable_data_ptr<int32_t>(),
                        order.choice_R.mutable_data_ptr<int64_t>(), order.row_TK.mutable_data_ptr<int64_t>(),
                        order.end_E.mutable_data_ptr<int32_t>(), rows, slots},
                       device::current_stream(of.device()));
  return order;
}

}  // namespace

Tensor inverse_of(const Tensor& permutation_R) {
  return at::empty_like(permutation_R).scatter_(0, permutation_R, count_up_to(permutation_R.size(0), permutation_R));
}

RowOrder by_choice(const RowOrder& order) {
  RowOrder each = order;
  each.row_TK = order.row_TK.view({-1, 1});
  return each;
}

RowOrder sort_by_expert(const Tensor& expert_TK, int64_t experts) {
  RowOrder order = sort_by_expert(expert_TK, 0, experts, expert_TK.numel());
  order.every_choice = true;
  return order;
}

RowOrder sort_by_expert(const Tensor& expert_TK, int64_t first, int64_t experts, int64_t rows) {
  if (!kernel_takes(expert_TK, experts)) return sort_by_expert_written_out(expert_TK, first, experts, rows);
  RowOrder order = sort_by_kernel(expert_TK, first, experts, rows, 0);
  order.every_choice = false;
  return order;
}

RowOrder slots_by_expert(const Tensor& expert_TK, int64_t first, int64_t experts, int64_t slots) {
  if (!kernel_takes(expert_TK, experts) || slots == 0) return slots_by_expert_written_out(expert_TK, first, experts, slots);
  RowOrder order = sort_by_kernel(expert_TK, first, experts, experts * slots, slots);
  order.every_row = order.every_choice = false;
  return order;
}

Tensor count_choices(const Tensor& of, int64_t experts, int64_t first) {
  if (!kernel_takes(of, experts)) return count_choices_written_out(of, experts, first);
  const Tensor expert_TK = of.contiguous(), space = space_for(of, experts), count = at::empty({experts}, of.options());
  cuda::count_by_expert({expert_TK.const_data_ptr<int64_t>(), of.numel(), first, experts, space.mutable_data_ptr<int32_t>(),
                         count.mutable_data_ptr<int64_t>()},
                        device::current_stream(of.device()));
  return count;
}

RowOrder sort_by_expert_written_out(const Tensor& expert_TK, int64_t first, int64_t experts, int64_t rows) {
  const Tensor number_N = numbers_in_range(expert_TK, first, experts);
  const Tensor sorted_N = at::argsort(number_N, /*stable=*/true);   // all others come last
  const Tensor end_E = occurrences(number_N, experts + 1).narrow(0, 0, experts).cumsum(0, at::kInt);
  return {sorted_N.narrow(0, 0, rows), inverse_of(sorted_N).clamp_max_(rows).view(expert_TK.sizes()), end_E, true, false};
}

RowOrder slots_by_expert_written_out(const Tensor& expert_TK, int64_t first, int64_t experts, int64_t slots) {
  const Tensor number_N = numbers_in_range(expert_TK, first, experts), sorted_N = at::argsort(number_N, /*stable=*/true);
  const Tensor count = occurrences(number_N, experts + 1), begin = count.cumsum(0) - count;
  const Tensor expert_N = number_N.index_select(0, sorted_N);
  const Tensor place_N = count_up_to(number_N.size(0), number_N) - begin.index_select(0, expert_N);
  const int64_t rows = experts * slots;
  const Tensor row_N = at::where(expert_N.lt(experts), expert_N * slots + place_N, rows);
  const Tensor choice = at::full({rows + 1}, number_N.size(0), number_N.options()).scatter_(0, row_N, sorted_N);
  const Tensor end_E = (count_up_to(experts, number_N) + 1).mul_(slots).to(at::kInt);
  return {choice.narrow(0, 0, rows), at::empty_like(row_N).scatter_(0, sorted_N, row_N).view(expert_TK.sizes()), end_E, false, false};
}

Tensor count_choices_written_out(const Tensor& expert_TK, int64_t experts, int64_t first) {
  return occurrences(numbers_in_range(expert_TK, first, experts), experts + 1).narrow(0, 0, experts);
}

}  // namespace upcycle
