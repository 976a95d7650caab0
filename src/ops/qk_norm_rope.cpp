#include "ops/qk_norm_rope.hpp"

#include <ATen/ops/empty.h>

#include "base/autograd.hpp"
#include "device/stream.hpp"
#include "ops/cuda/qk_norm_rope.hpp"
#include "ops/kernel.hpp"
#include "ops/rms_norm.hpp"

namespace upcycle {
namespace {

bool is_bf16(const Tensor& x) { return x.scalar_type() == at::kBFloat16; }

// Neighbouring heads of a row.
struct Part {
  int64_t first, heads;
};

// What the op is of, and the numbers that follow from it.
struct Split {
  Split(const Tensor& qkv, int64_t head_dim, const HeadColumns& columns)
      : head_dim(head_dim), sequences(columns.sequences), positions(qkv.size(0) / columns.sequences), eps(columns.eps), rotary(columns.rotary),
        q{0, columns.heads}, k{columns.heads, columns.kv_heads}, v{columns.heads + columns.kv_heads, columns.kv_heads} {}

  Tensor of(const Tensor& qkv, const Part& part) const {
    return qkv.narrow(-1, part.first * head_dim, part.heads * head_dim).view({sequences, positions, part.heads, head_dim});
  }
  bool kernel_takes(const Tensor& qkv, const Tensor& weight) const {
    return in_vectors(qkv) && in_vectors(weight) && weight.scalar_type() == qkv.scalar_type() && in_vectors(rotary.cos_SD) &&
           in_vectors(rotary.sin_SD) && cuda::qk_norm_rope_takes(head_dim, is_bf16(qkv));
  }

  int64_t head_dim, sequences, positions;
  double eps;
  RotaryTable rotary;
  Part q, k, v;
};

Tensor written_out(const Split& split, const Tensor& qkv, const Part& part, const Parameter& norm) {
  const Tensor x = split.of(qkv, part);
  const Tensor unit = (x.to(at::kFloat) * inverse_rms(x, split.eps)).to(x.scalar_type());
  return rotate(unit.mul_(norm.arrived()), split.rotary);
}

struct Wanted {
  Part part;
  const Parameter& norm;
};

// One tensor for each of up to two parts, in one launch.
std::vector<Tensor> by_kernel(const Split& split, const Tensor& qkv, const std::vector<Wanted>& all) {
  std::vector<Tensor> out;
  cuda::QkNormRope job = {.qkv = qkv.const_data_ptr(), .row = qkv.size(1), .part = {}, .cos = split.rotary.cos_SD.const_data_ptr<float>(),
                          .sin = split.rotary.sin_SD.const_data_ptr<float>(), .tokens = qkv.size(0), .positions = split.positions,
                          .head_dim = static_cast<int>(split.head_dim), .eps = static_cast<float>(split.eps), .bf16 = is_bf16(qkv)};
  for (const auto& [part, norm] : all) {
    const Tensor& y = out.emplace_back(at::empty({split.sequences, split.positions, part.heads, split.head_dim}, qkv.options()));
    job.part[out.size() - 1] = {static_cast<int>(part.first), static_cast<int>(part.heads), norm.arrived().const_data_ptr(), y.data_ptr()};
  }
  cuda::qk_norm_rope(job, device::current_stream(qkv.device()));
  return out;
}

Tensor heads_of(const Split& split, const Tensor& qkv, const Part& part, const Parameter& norm) {
  const Unrecorded guard;
  return split.kernel_takes(qkv, norm.value) ? by_kernel(split, qkv, {{part, norm}})[0] : written_out(split, qkv, part, norm);
}

// A gradient as the kernel can read it: any layout whose heads are whole and begin at vectors. The tensor lives as long as the kernel needs it.
struct Incoming {
  Incoming(const Tensor& dy, const Part& part) : tensor(dy), heads{static_cast<int>(part.first), static_cast<int>(part.heads), nullptr, 0, 0, 0} {
    if (!dy.defined()) return;
    const int64_t vector = 16 / dy.element_size();
    const bool whole = dy.stride(3) == 1 && dy.stride(0) % vector == 0 && dy.stride(1) % vector == 0 && dy.stride(2) % vector == 0 &&
                       reinterpret_cast<uintptr_t>(dy.const_data_ptr()) % 16 == 0;
    if (!whole) tensor = dy.clone(at::MemoryFormat::Contiguous);
    heads.dy = tensor.const_data_ptr();
    heads.of_sequence = tensor.stride(0), heads.of_position = tensor.stride(1), heads.of_head = tensor.stride(2);
  }
  Tensor tensor;
  cuda::HeadGradient heads;
};

Tensor backward_by_kernel(const Split& split, const Tensor& qkv, const std::vector<Tensor>& d, Parameter& q_norm, Parameter& k_norm) {
  const Incoming q(d[0], split.q), k(d[1], split.k), v(d[2], split.v);
  const Tensor d_qkv = at::empty(qkv.sizes(), qkv.options());
  const auto blocks = cuda::qk_norm_rope_blocks(qkv.size(0), split.q.heads, split.k.heads);
  const Tensor partial = at::empty({blocks.q + blocks.k, split.head_dim}, qkv.options().dtype(at::kFloat));
  float* const sums = partial.mutable_data_ptr<float>();
  cuda::qk_norm_rope_backward(
      {.qkv = qkv.const_data_ptr(), .d_qkv = d_qkv.data_ptr(), .row = qkv.size(1),
       .q = {q.heads, q_norm.value.const_data_ptr(), sums, q_norm.sums().mutable_data_ptr<float>(), blocks.q},
       .k = {k.heads, k_norm.value.const_data_ptr(), sums + blocks.q * split.head_dim, k_norm.sums().mutable_data_ptr<float>(), blocks.k},
       .v = v.heads, .cos = split.rotary.cos_SD.const_data_ptr<float>(), .sin = split.rotary.sin_SD.const_data_ptr<float>(),
       .tokens = qkv.size(0), .positions = split.positions, .head_dim = static_cast<int>(split.head_dim),
       .eps = static_cast<float>(split.eps), .bf16 = is_bf16(qkv)},
      device::current_stream(qkv.device()));
  return d_qkv;
}

Tensor backward_written_out(const Split& split, const Tensor& qkv, const std::vector<Tensor>& d, Parameter& q_norm, Parameter& k_norm) {
  const Tensor d_qkv = at::empty(qkv.sizes(), qkv.options());
  const auto write = [&](const Part& part, const Tensor& dy, Parameter* norm) {
    const Tensor here = split.of(d_qkv, part);
    if (!dy.defined()) {
      here.zero_();
      if (norm) norm->sums();   // nothing is added to them
    } else if (norm == nullptr) {
      here.copy_(dy);
    } else {
      const Tensor x = split.of(qkv, part);
      here.copy_(rms_norm_backward(rotate_back(dy.to(at::kFloat), split.rotary), x, inverse_rms(x, split.eps), *norm));
    }
  };
  write(split.q, d[0], &q_norm);
  write(split.k, d[1], &k_norm);
  write(split.v, d[2], nullptr);
  return d_qkv;
}

Heads heads(const Split& split, const Tensor& qkv, Parameter& q_norm, Parameter& k_norm, bool kernel) {
  std::vector<Tensor> qkv_heads;
  {
    const Unrecorded guard;
    qkv_heads = kernel ? by_kernel(split, qkv, {{split.q, q_norm}, {split.k, k_norm}})
                       : std::vector<Tensor>{written_out(split, qkv, split.q, q_norm), written_out(split, qkv, split.k, k_norm)};
    qkv_heads.push_back(split.of(qkv.detach(), split.v));
  }
  const auto backward = [split, qkv = qkv.detach(), &q_norm, &k_norm, kernel](const std::vector<Tensor>& d) -> Gradients {
    const Tensor d_qkv = (kernel ? backward_by_kernel : backward_written_out)(split, qkv, d, q_norm, k_norm);
    q_norm.ready();
    k_norm.ready();
    return {d_qkv};
  };
  const std::vector<Tensor> recorded = record(std::move(qkv_heads), {qkv}, backward);
  return {recorded[0], recorded[1], recorded[2]};
}

}  // namespace

Heads qk_norm_rope(const Tensor& qkv, Parameter& q_norm, Parameter& k_norm, const HeadColumns& columns) {
  const Split split(qkv, q_norm.value.size(0), columns);
  return heads(split, qkv, q_norm, k_norm, split.kernel_takes(qkv, q_norm.value) && split.kernel_takes(qkv, k_norm.value));
}

Heads qk_norm_rope_written_out(const Tensor& qkv, Parameter& q_norm, Parameter& k_norm, const HeadColumns& columns) {
  return heads(Split(qkv, q_norm.value.size(0), columns), qkv, q_norm, k_norm, false);
}

Tensor normed_q(const Tensor& qkv, const Parameter& q_norm, const HeadColumns& columns) {
  const Split split(qkv, q_norm.value.size(0), columns);
  return heads_of(split, qkv, split.q, q_norm);
}

Tensor normed_k(const Tensor& qkv, const Parameter& k_norm, const HeadColumns& columns) {
  const Split split(qkv, k_norm.value.size(0), columns);
  return heads_of(split, qkv, split.k, k_norm);
}

}  // namespace upcycle
