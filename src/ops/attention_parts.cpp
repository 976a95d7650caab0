#include "ops/attention_parts.hpp"

#include <ATen/ops/logaddexp.h>

#include <algorithm>
#include <limits>

#include "device/stream.hpp"
#include "ops/cuda/attention_parts.hpp"

namespace upcycle {
namespace {

/// Whether a kernel that reads 16 bytes of a row at a time can have `x`.
bool kernel_takes(const Tensor& x) {
  const auto whole = [&](int64_t dim) { return x.stride(dim) % 8 == 0; };
  return x.is_cuda() && x.scalar_type() == at::kBFloat16 && x.stride(3) == 1 && x.size(3) % 8 == 0 && whole(0) && whole(1) && whole(2) &&
         reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0 && x.numel() < std::numeric_limits<int32_t>::max();
}

cuda::Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

cuda::Heads heads_of(const Tensor& x) { return {const_cast<void*>(x.const_data_ptr()), strides_of(x)}; }

cuda::Shape shape_of(const Tensor& x) {
  return {static_cast<int>(x.size(0)), static_cast<int>(x.size(1)), static_cast<int>(x.size(2)), static_cast<int>(x.size(3))};
}

}  // namespace

void merge_parts(Tensor out, Tensor lse, const Dense& a, const Dense& b) {
  if (!kernel_takes(out) || !kernel_takes(a.out_BHSD) || !kernel_takes(b.out_BHSD)) return merge_parts_written_out(out, lse, a, b);
  if (out.numel() == 0) return;
  const auto sums = [](const Tensor& x) { return cuda::Sums{const_cast<float*>(x.const_data_ptr<float>()), strides_of(x)}; };
  cuda::merge_parts({shape_of(out), heads_of(out), heads_of(a.out_BHSD), heads_of(b.out_BHSD), sums(lse), sums(a.log_sum_exp_BHS), sums(b.log_sum_exp_BHS)},
                    device::current_stream(out.device()));
}

void merge_parts_written_out(Tensor out, Tensor lse, const Dense& a, const Dense& b) {
  const Tensor both = at::logaddexp(a.log_sum_exp_BHS, b.log_sum_exp_BHS);
  const auto share = [&](const Dense& part) { return part.out_BHSD * (part.log_sum_exp_BHS - both).exp_().unsqueeze(-1); };
  out.copy_(share(a) + share(b));
  lse.copy_(both);
}

void sum_parts(Tensor to, const std::vector<Tensor>& parts) {
  if (parts.size() > cuda::PartsSum::kMost || !kernel_takes(to) || !std::all_of(parts.begin(), parts.end(), kernel_takes)) return sum_parts_written_out(to, parts);
  if (to.numel() == 0) return;
  cuda::PartsSum sum = {.shape = shape_of(to), .to = heads_of(to), .parts = {}, .count = static_cast<int>(parts.size())};
  std::transform(parts.begin(), parts.end(), sum.parts, heads_of);
  cuda::sum_parts(sum, device::current_stream(to.device()));
}

void sum_parts_written_out(Tensor to, const std::vector<Tensor>& parts) {
  Tensor sum = parts.front();
  for (size_t i = 1; i < parts.size(); ++i) sum = sum.to(at::kFloat) + parts[i];
  to.copy_(sum);
}

}  // namespace upcycle
