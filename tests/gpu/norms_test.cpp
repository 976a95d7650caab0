// The kernels of norms and of rotated heads against their written-out forms on the same GPU (which tests/unit/ops and ops_test.cpp hold
// against fp64), and against memory: `--gtest_also_run_disabled_tests --gtest_filter=*Rates` says how fast they are beside a copy.
#include <ATen/Context.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <chrono>
#include <cstdio>
#include <functional>

#include "device/device.hpp"
#include "device/stream.hpp"
#include "ops/cuda/qk_norm_rope.hpp"
#include "ops/cuda/rms_norm.hpp"
#include "ops/qk_norm_rope.hpp"
#include "ops/rms_norm.hpp"
#include "support/numbers.hpp"

namespace upcycle {
namespace {

const at::Device kGpu(at::kCUDA, 0);
constexpr double kEps = 1e-6;

/// Standard normal numbers, drawn, compared and measured where they are: rows of a model are many.
Tensor on_gpu(const Shape& shape, uint64_t seed, at::ScalarType dtype) {
  at::Generator generator = at::globalContext().defaultGenerator(kGpu);
  generator.set_current_seed(seed);
  return at::randn(shape, generator, at::TensorOptions(at::kFloat).device(kGpu)).to(dtype);
}
bool bits_agree(const Tensor& a, const Tensor& b) {
  const auto bits = [](const Tensor& x) { return x.detach().contiguous().view(x.scalar_type() == at::kFloat ? at::kInt : at::kShort); };
  return a.scalar_type() == b.scalar_type() && bits(a).equal(bits(b));
}
double relative(const Tensor& a, const Tensor& b) {
  if (bits_agree(a, b)) return 0.0;
  const Tensor a64 = a.detach().to(at::kDouble), b64 = b.detach().to(at::kDouble);
  return (a64 - b64).norm().item<double>() / b64.norm().item<double>();
}
Parameter weight_on_gpu(int64_t width, uint64_t seed, at::ScalarType dtype) { return trained(on_gpu({width}, seed, dtype)); }

struct Results {
  std::vector<Tensor> values;   ///< in the op's dtype: outputs, gradients
  std::vector<Tensor> sums;     ///< fp32, in any precision: main_grad
};

bool same(const Results& a, const Results& b) {
  bool yes = true;
  for (size_t i = 0; i < a.values.size(); ++i) yes = yes && bits_agree(a.values[i], b.values[i]);
  for (size_t i = 0; i < a.sums.size(); ++i) yes = yes && bits_agree(a.sums[i], b.sums[i]);
  return yes;
}

/// Both forms round at the same places. They differ in the order of sums, by which a bf16 number is now and then another neighbour.
void expect_near(const Results& kernel, const Results& plain, at::ScalarType dtype) {
  ASSERT_EQ(kernel.values.size(), plain.values.size());
  for (size_t i = 0; i < kernel.values.size(); ++i) {
    EXPECT_EQ(kernel.values[i].scalar_type(), dtype);
    EXPECT_LE(relative(kernel.values[i], plain.values[i]), dtype == at::kFloat ? 2e-6 : 1e-3) << "value " << i;
  }
  for (size_t i = 0; i < kernel.sums.size(); ++i) EXPECT_LE(relative(kernel.sums[i], plain.sums[i]), 1e-5) << "main_grad " << i;
}

// ---- rms_norm ----

enum class Form { alone, beside, behind_a_sum };

/// Two passes; the stream's gradient as a view with other strides in the second.
Results norm(Form form, bool kernel, const Shape& shape, at::ScalarType dtype) {
  Parameter weight = weight_on_gpu(shape.back(), 1, dtype);
  Results results;
  for (uint64_t pass = 0; pass < 2; ++pass) {
    const Tensor x = on_gpu(shape, 10 + pass, dtype).requires_grad_();
    const Tensor branch = form == Form::behind_a_sum ? on_gpu(shape, 20 + pass, dtype).requires_grad_() : Tensor();
    Normed y;
    if (!kernel) {
      y = rms_norm_written_out(x, branch, weight, kEps);
    } else if (form == Form::alone) {
      y.norm_D = rms_norm(x, weight, kEps);
    } else {
      y = form == Form::beside ? rms_norm_beside(x, weight, kEps) : add_rms_norm(x, branch, weight, kEps);
    }
    const Tensor d_norm = on_gpu(shape, 30 + pass, dtype);
    Tensor d_x = on_gpu(shape, 40 + pass, dtype);
    if (pass == 1) d_x = d_x.select(-1, 0).unsqueeze(-1).expand(shape);
    if (form == Form::alone) {
      torch::autograd::backward({y.norm_D}, {d_norm});
    } else {
      torch::autograd::backward({y.x_D, y.norm_D}, {d_x, d_norm});
      results.values.push_back(y.x_D.detach());
    }
    results.values.push_back(y.norm_D.detach());
    results.values.push_back(x.grad());
    if (branch.defined()) results.values.push_back(branch.grad());
  }
  results.sums.push_back(weight.main_grad);
  EXPECT_EQ(weight.additions, 2);
  return results;
}

TEST(RmsNormOnGpu, IsTheWrittenOutFormAndTheSameEveryTime) {
  // Lanes of a warp, one row or many in it; several vectors a thread; rows over warps; no whole vectors; wider than a kernel takes.
  const std::vector<int64_t> widths = {4, 8, 16, 24, 40, 64, 104, 128, 256, 1000, 1024, 2048, 2560, 4096, 5120, 8192, 12288, 16384, 33, 7, 16392};
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const int64_t width : widths) {
      for (const int64_t rows : {0, 1, 5, width <= 128 ? 9001 : 1203}) {   // the last: more than backward has blocks
        for (const Form form : {Form::alone, Form::beside, Form::behind_a_sum}) {
          SCOPED_TRACE(testing::Message() << dtype << ", " << rows << " rows of " << width << ", form " << static_cast<int>(form));
          const Results kernel = norm(form, true, {rows, width}, dtype);
          expect_near(kernel, norm(form, false, {rows, width}, dtype), dtype);
          if (rows > 5) EXPECT_TRUE(same(kernel, norm(form, true, {rows, width}, dtype)));
        }
      }
    }
  }
}

TEST(RmsNormOnGpu, TakesRowsAsTheyLie) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    Parameter weight = weight_on_gpu(64, 1, dtype), plain = weight_on_gpu(64, 1, dtype);
    const Tensor wide = on_gpu({9, 3, 129}, 2, dtype);
    for (const Tensor& x : {wide.narrow(-1, 0, 64), wide.narrow(-1, 1, 64), wide.narrow(-1, 0, 64).transpose(0, 1)}) {
      const Tensor ours = rms_norm(x, weight, kEps), theirs = rms_norm_written_out(x, {}, plain, kEps).norm_D;
      EXPECT_LE(relative(ours, theirs), dtype == at::kFloat ? 1e-6 : 1e-3);
    }
  }
}

// Selective recomputation makes the norm behind a sum again out of the sum.
TEST(RmsNormOnGpu, BehindASumIsTheNormOfTheSum) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const int64_t width : {64, 1000, 2048, 5120, 12288, 33}) {
      Parameter weight = weight_on_gpu(width, 1, dtype);
      const Tensor x = on_gpu({301, width}, 2, dtype), branch = on_gpu({301, width}, 3, dtype);
      const auto [sum, norm] = add_rms_norm(x, branch, weight, kEps);
      EXPECT_TRUE(bits_agree(sum, x + branch));
      EXPECT_TRUE(bits_agree(norm, rms_norm(sum, weight, kEps))) << width;
    }
  }
}

TEST(RmsNormOnGpu, OneOfBothIsEnough) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    Parameter weight = weight_on_gpu(256, 1, dtype);
    const Tensor x = on_gpu({9, 256}, 2, dtype).requires_grad_(), branch = on_gpu({9, 256}, 3, dtype).requires_grad_();
    const Tensor d = on_gpu({9, 256}, 4, dtype);
    run_backward(add_rms_norm(x, branch, weight, kEps).x_D, d);
    EXPECT_TRUE(bits_agree(x.grad(), d));
    EXPECT_EQ(weight.main_grad.abs().max().item<double>(), 0.0);
    EXPECT_EQ(weight.additions, 1);
  }
}

// ---- qk_norm_rope ----

struct HeadsCase {
  int64_t sequences, positions, heads, kv_heads, head_dim;
  Shape qkv() const { return {sequences * positions, (heads + 2 * kv_heads) * head_dim}; }
  HeadColumns columns() const { return {sequences, heads, kv_heads, kEps, rotary_table(positions, head_dim, 1e6, kGpu)}; }
  Shape shape(int64_t count) const { return {sequences, positions, count, head_dim}; }
};

/// Two passes; in the second the gradients lie with heads before positions, as attention's do, and inside a larger tensor.
Results rotated_heads(const HeadsCase& c, bool kernel, at::ScalarType dtype) {
  Parameter q_norm = weight_on_gpu(c.head_dim, 1, dtype), k_norm = weight_on_gpu(c.head_dim, 2, dtype);
  Results results;
  for (uint64_t pass = 0; pass < 2; ++pass) {
    const Tensor qkv = on_gpu(c.qkv(), 10 + pass, dtype).requires_grad_();
    const auto [q, k, v] = (kernel ? qk_norm_rope : qk_norm_rope_written_out)(qkv, q_norm, k_norm, c.columns());
    const auto gradient = [&](int64_t count, uint64_t seed) {
      if (pass == 0) return on_gpu(c.shape(count), seed, dtype);
      return on_gpu({c.sequences, count + 1, c.positions, c.head_dim}, seed, dtype).narrow(1, 1, count).transpose(1, 2);
    };
    torch::autograd::backward({q, k, v}, {gradient(c.heads, 30 + pass), gradient(c.kv_heads, 40 + pass), gradient(c.kv_heads, 50 + pass)});
    for (const Tensor& x : {q.detach(), k.detach(), v.detach(), qkv.grad()}) results.values.push_back(x);
  }
  results.sums = {q_norm.main_grad, k_norm.main_grad};
  EXPECT_EQ(q_norm.additions, 2);
  EXPECT_EQ(k_norm.additions, 2);
  return results;
}

TEST(QkNormRopeOnGpu, IsTheWrittenOutFormAndTheSameEveryTime) {
  const std::vector<HeadsCase> cases = {{1, 1, 1, 1, 128},   {2, 129, 16, 8, 128}, {3, 700, 5, 1, 128}, {1, 33, 7, 7, 64},   {2, 65, 40, 8, 128},
                                        {2, 65, 4, 2, 16},   {1, 9, 3, 2, 80},     {1, 130, 4, 2, 96},  {1, 31, 4, 1, 192},  {1, 31, 2, 1, 256},
                                        {1, 31, 2, 1, 512},  {2, 17, 4, 2, 10},    {2, 17, 4, 2, 8},    {1, 17, 2, 1, 1024}, {2, 0, 4, 2, 128}};
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const HeadsCase& c : cases) {
      SCOPED_TRACE(testing::Message() << dtype << ", " << c.sequences << " x " << c.positions << ", " << c.heads << "/" << c.kv_heads << " heads of "
                                      << c.head_dim);
      const Results kernel = rotated_heads(c, true, dtype);
      expect_near(kernel, rotated_heads(c, false, dtype), dtype);
      EXPECT_TRUE(same(kernel, rotated_heads(c, true, dtype)));
    }
  }
}

TEST(QkNormRopeOnGpu, AgainIsTheSameBits) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const HeadsCase& c : {HeadsCase{2, 129, 16, 8, 128}, HeadsCase{2, 17, 4, 2, 10}}) {
      Parameter q_norm = weight_on_gpu(c.head_dim, 1, dtype), k_norm = weight_on_gpu(c.head_dim, 2, dtype);
      const Tensor qkv = on_gpu(c.qkv(), 3, dtype);
      const auto [q, k, v] = qk_norm_rope(qkv, q_norm, k_norm, c.columns());
      EXPECT_TRUE(bits_agree(normed_q(qkv, q_norm, c.columns()), q));
      EXPECT_TRUE(bits_agree(normed_k(qkv, k_norm, c.columns()), k));
    }
  }
}

TEST(QkNormRopeOnGpu, EachOfThemAloneIsEnough) {
  const HeadsCase c{2, 33, 4, 2, 64};
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const int which : {0, 1, 2}) {
      Results results[2];
      for (const bool kernel : {false, true}) {
        Parameter q_norm = weight_on_gpu(c.head_dim, 1, dtype), k_norm = weight_on_gpu(c.head_dim, 2, dtype);
        const Tensor qkv = on_gpu(c.qkv(), 3, dtype).requires_grad_();
        const Heads heads = (kernel ? qk_norm_rope : qk_norm_rope_written_out)(qkv, q_norm, k_norm, c.columns());
        const Tensor y = which == 0 ? heads.q_BSHD : which == 1 ? heads.k_BSGD : heads.v_BSGD;
        run_backward(y, on_gpu(y.sizes().vec(), 4, dtype));
        results[kernel] = {{qkv.grad()}, {q_norm.main_grad, k_norm.main_grad}};
      }
      SCOPED_TRACE(which);
      expect_near(results[1], results[0], dtype);
    }
  }
}

// ---- the kernels themselves, at a model's shapes ----

/// All four at 16384 tokens of Qwen3-1.7B.
struct Launches {
  static constexpr int64_t kTokens = 16384, kWidth = 2048, kPositions = 4096, kHeads = 16, kKvHeads = 8, kHeadDim = 128;
  explicit Launches(at::ScalarType dtype) : dtype(dtype) {}

  at::ScalarType dtype;
  bool bf16 = dtype == at::kBFloat16;
  int64_t bytes = bf16 ? 2 : 4;
  CUstream_st* stream = device::current_stream(kGpu);
  Parameter weight = weight_on_gpu(kWidth, 1, dtype), q_norm = weight_on_gpu(kHeadDim, 2, dtype), k_norm = weight_on_gpu(kHeadDim, 3, dtype);
  Tensor x = on_gpu({kTokens, kWidth}, 4, dtype), branch = on_gpu({kTokens, kWidth}, 5, dtype), dy = on_gpu({kTokens, kWidth}, 6, dtype);
  Tensor sum = at::empty_like(x), y = at::empty_like(x), dx = at::empty_like(x);
  Tensor scale = at::zeros({kTokens}, x.options().dtype(at::kFloat));
  Tensor partial = at::zeros({cuda::rms_norm_partials(kTokens, kWidth, bf16), kWidth}, scale.options());
  HeadsCase c{kTokens / kPositions, kPositions, kHeads, kKvHeads, kHeadDim};
  RotaryTable rotary = c.columns().rotary;
  Tensor qkv = on_gpu(c.qkv(), 7, dtype), d_qkv = at::empty_like(qkv);
  Tensor q = at::zeros(c.shape(kHeads), x.options()), k = at::zeros(c.shape(kKvHeads), x.options());
  Tensor dq = on_gpu(c.shape(kHeads), 8, dtype), dk = on_gpu(c.shape(kKvHeads), 9, dtype), dv = on_gpu(c.shape(kKvHeads), 10, dtype);
  cuda::BlocksOf blocks = cuda::qk_norm_rope_blocks(kTokens, kHeads, kKvHeads);
  Tensor head_partial = at::zeros({blocks.q + blocks.k, kHeadDim}, scale.options());

  void forward(bool adds) {
    cuda::rms_norm({x.data_ptr(), adds ? branch.data_ptr() : nullptr, weight.value.data_ptr(), adds ? sum.data_ptr() : nullptr, y.data_ptr(),
                    scale.mutable_data_ptr<float>(), kTokens, kWidth, kEps, bf16}, stream);
  }
  void backward(bool streams) {   // of x and its scale
    cuda::rms_norm_backward({x.data_ptr(), scale.const_data_ptr<float>(), weight.value.data_ptr(), dy.data_ptr(),
                             streams ? branch.data_ptr() : nullptr, dx.data_ptr(), partial.mutable_data_ptr<float>(),
                             weight.main_grad.mutable_data_ptr<float>(), kTokens, kWidth, bf16}, stream);
  }
  void heads() {
    cuda::qk_norm_rope({.qkv = qkv.data_ptr(), .row = qkv.size(1),
                        .part = {{0, kHeads, q_norm.value.data_ptr(), q.data_ptr()}, {kHeads, kKvHeads, k_norm.value.data_ptr(), k.data_ptr()}},
                        .cos = rotary.cos_SD.const_data_ptr<float>(), .sin = rotary.sin_SD.const_data_ptr<float>(), .tokens = kTokens,
                        .positions = kPositions, .head_dim = kHeadDim, .eps = kEps, .bf16 = bf16}, stream);
  }
  void heads_backward() {
    const auto gradient = [](const Tensor& d, int64_t first) {
      return cuda::HeadGradient{static_cast<int>(first), static_cast<int>(d.size(2)), d.data_ptr(), d.stride(0), d.stride(1), d.stride(2)};
    };
    float* const sums = head_partial.mutable_data_ptr<float>();
    cuda::qk_norm_rope_backward(
        {.qkv = qkv.data_ptr(), .d_qkv = d_qkv.data_ptr(), .row = qkv.size(1),
         .q = {gradient(dq, 0), q_norm.value.data_ptr(), sums, q_norm.main_grad.mutable_data_ptr<float>(), blocks.q},
         .k = {gradient(dk, kHeads), k_norm.value.data_ptr(), sums + blocks.q * kHeadDim, k_norm.main_grad.mutable_data_ptr<float>(), blocks.k},
         .v = gradient(dv, kHeads + kKvHeads), .cos = rotary.cos_SD.const_data_ptr<float>(), .sin = rotary.sin_SD.const_data_ptr<float>(),
         .tokens = kTokens, .positions = kPositions, .head_dim = kHeadDim, .eps = kEps, .bf16 = bf16}, stream);
  }
};

// Sums of 16384 rows in one order have its bits: these are no written-out forms that took over unseen.
TEST(NormsOnGpu, TheOpsAreTheKernels) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    Launches l(dtype);
    l.forward(false);
    l.backward(true);
    Parameter weight = weight_on_gpu(Launches::kWidth, 1, dtype);
    const Tensor x = l.x.detach().requires_grad_();
    const auto [same, norm] = rms_norm_beside(x, weight, kEps);
    torch::autograd::backward({same, norm}, {l.branch, l.dy});
    EXPECT_TRUE(bits_agree(norm.detach(), l.y));
    EXPECT_TRUE(bits_agree(x.grad(), l.dx));
    EXPECT_TRUE(bits_agree(weight.main_grad, l.weight.main_grad));

    l.heads();
    l.heads_backward();
    Parameter q_norm = weight_on_gpu(Launches::kHeadDim, 2, dtype), k_norm = weight_on_gpu(Launches::kHeadDim, 3, dtype);
    const Tensor qkv = l.qkv.detach().requires_grad_();
    const auto [q, k, v] = qk_norm_rope(qkv, q_norm, k_norm, l.c.columns());
    torch::autograd::backward({q, k, v}, {l.dq, l.dk, l.dv});
    EXPECT_TRUE(bits_agree(q.detach(), l.q));
    EXPECT_TRUE(bits_agree(k.detach(), l.k));
    EXPECT_TRUE(bits_agree(qkv.grad(), l.d_qkv));
    EXPECT_TRUE(bits_agree(q_norm.main_grad, l.q_norm.main_grad));
    EXPECT_TRUE(bits_agree(k_norm.main_grad, l.k_norm.main_grad));
  }
}

/// Terabytes a second over 200 launches in a row.
double rate(int64_t bytes, const std::function<void()>& launch) {
  for (int i = 0; i < 20; ++i) launch();
  device::synchronize(kGpu);
  const auto begin = std::chrono::steady_clock::now();
  for (int i = 0; i < 200; ++i) launch();
  device::synchronize(kGpu);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  return static_cast<double>(bytes) * 200 / seconds.count() * 1e-12;
}

// For a GPU that nobody else uses.
TEST(NormsOnGpu, DISABLED_Rates) {
  const Tensor from = at::zeros({int64_t{1} << 30}, at::TensorOptions(at::kBFloat16).device(kGpu)), to = at::empty_like(from);
  const double copy = rate(int64_t{4} << 30, [&] { to.copy_(from); });
  std::printf("copy %.2f TB/s\n", copy);
  for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat}) {
    Launches l(dtype);
    const int64_t rows = Launches::kTokens * Launches::kWidth * l.bytes, head = Launches::kTokens * Launches::kHeadDim * l.bytes;
    const int64_t q_and_k = Launches::kHeads + Launches::kKvHeads, all = q_and_k + Launches::kKvHeads;
    const auto show = [&](const char* what, int64_t bytes, const std::function<void()>& launch) {
      const double reached = rate(bytes, launch);
      std::printf("%s %-32s %4.0f MB %6.1f us %5.2f TB/s, %3.0f %% of a copy\n", l.bf16 ? "bf16" : "fp32", what, static_cast<double>(bytes) * 1e-6,
                  static_cast<double>(bytes) / reached * 1e-6, reached, 100 * reached / copy);
      EXPECT_GE(reached, 0.8 * copy) << what;
    };
    show("rms_norm", 2 * rows, [&] { l.forward(false); });
    show("add_rms_norm", 4 * rows, [&] { l.forward(true); });
    show("rms_norm, backward", 3 * rows, [&] { l.backward(false); });
    show("add_rms_norm, backward", 4 * rows, [&] { l.backward(true); });
    show("qk_norm_rope", 2 * q_and_k * head, [&] { l.heads(); });
    show("qk_norm_rope, backward", (q_and_k + 2 * all) * head, [&] { l.heads_backward(); });
  }
}

}  // namespace
}  // namespace upcycle
