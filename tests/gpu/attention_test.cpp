// Attention by cuDNN and by the flash kernel against every score written out in fp32: outputs, log-sum-exp, gradients.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <c10/core/Event.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAStream.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <tuple>

#include "device/device.hpp"
#include "ops/attention.hpp"
#include "ops/attention_parts.hpp"
#include "support/no_waiting.hpp"
#include "support/numbers.hpp"

// Shapes: B sequences, S positions, H query heads, G key/value heads, D head width.
namespace upcycle {
namespace {

const at::Device kGpu(at::kCUDA, 0);
using enum AttentionKernel;

struct Form {
  int64_t sequences, positions, heads, groups, width;
};
std::ostream& operator<<(std::ostream& out, const Form& f) {
  return out << f.sequences << " x " << f.positions << " positions, " << f.heads << "/" << f.groups << " heads of " << f.width;
}
const std::vector<Form> kForms = {{2, 1, 4, 4, 16},     {2, 9, 4, 4, 16},     {1, 65, 8, 1, 64},    {2, 130, 16, 2, 128}, {3, 257, 4, 2, 128},
                                  {2, 1000, 16, 8, 128}, {1, 2048, 16, 8, 128}, {2, 128, 6, 3, 40},  {2, 200, 4, 2, 256}};

/// q, k and v as the model has them: rotated ones by themselves, v a slice of the projection's output.
struct Inputs {
  explicit Inputs(const Form& f, at::ScalarType dtype = at::kBFloat16) {
    const auto draw = [&](int64_t heads, uint64_t seed) {
      return normal({f.sequences, f.positions, heads, f.width}, seed).to(at::kBFloat16).to(dtype).to(kGpu);
    };
    projected = draw(f.heads + 2 * f.groups, 3).requires_grad_();
    q = draw(f.heads, 1).requires_grad_(), k = draw(f.groups, 2).requires_grad_();
    v = projected.narrow(2, f.heads + f.groups, f.groups);
    d = draw(f.heads, 4);
  }
  std::vector<Tensor> gradients() const { return {q.grad(), k.grad(), projected.grad()}; }
  Tensor projected, q, k, v, d;
};

void expect_near(const Attended& y, const Inputs& inputs, const Attended& y32, const Inputs& inputs32, const char* kernel) {
  SCOPED_TRACE(kernel);
  EXPECT_LE(distance(y.out_BSHD, y32.out_BSHD), 3 * 0x1p-8);
  EXPECT_EQ(y.log_sum_exp_BHS.scalar_type(), at::kFloat);
  // Of one score alone it may be near 0.
  EXPECT_LE((y.log_sum_exp_BHS - y32.log_sum_exp_BHS).abs().max().item<float>(), 0x1p-7);
  for (size_t i = 0; i < 3; ++i) {
    const Tensor got = inputs.gradients()[i], expected = inputs32.gradients()[i];
    if (expected.abs().max().item<float>() > 1e-5f) {
      EXPECT_LE(distance(got, expected), 3 * 0x1p-8) << "gradient " << i;
    } else {   // one key alone gets all the weight whatever its score: nothing but rounding is left
      EXPECT_LE(got.abs().max().item<float>(), 0x1p-6 * inputs32.d.abs().max().item<float>()) << "gradient " << i;
    }
  }
}

Attended pass(const Inputs& x, AttentionKernel kernel) {
  const Attended y = attention(x.q, x.k, x.v, {}, kernel);
  run_backward(y.out_BSHD, x.d.to(y.out_BSHD.scalar_type()));
  return y;
}

TEST(AttentionKernels, AreTheFormula) {
  for (const Form& f : kForms) {
    SCOPED_TRACE(testing::Message() << f);
    const Inputs x32(f, at::kFloat);
    const Attended y32 = attention_written_out(x32.q, x32.k, x32.v);
    run_backward(y32.out_BSHD, x32.d);
    for (const auto& [kernel, name] : {std::pair{automatic, "automatic"}, {flash, "flash"}}) {
      const Inputs x(f);
      expect_near(pass(x, kernel), x, y32, x32, name);
    }
    if (f.width > 128 || f.positions < 64 || device::compute_capability(kGpu) < 90) continue;   // what cuDNN must not refuse
    const Inputs x(f);
    expect_near(pass(x, cudnn), x, y32, x32, "cuDNN");
  }
}

// What a context rank computes: two stretches of a sequence's queries, each on all keys up to its own, by cuDNN part by part; and the same
// by flash, as rows, where kernels may not plan for the lengths.
TEST(AttentionKernels, TakeTheStretchesOfContextRanks) {
  const Form whole{2, 4096, 8, 4, 128};
  for (const int rank : {0, 1}) {
    const int64_t chunk = 1024, first = rank * chunk, second = (3 - rank) * chunk;
    const std::vector<Segment> segments = {{0, chunk, 0, first + chunk}, {chunk, 2 * chunk, 0, second + chunk}};
    const auto pass = [&](at::ScalarType dtype, const auto& attention) {
      Inputs x(whole, dtype);
      x.q = normal({2, 2 * chunk, whole.heads, whole.width}, 7).to(at::kBFloat16).to(dtype).to(kGpu).requires_grad_();
      x.d = normal({2, 2 * chunk, whole.heads, whole.width}, 8).to(at::kBFloat16).to(dtype).to(kGpu);
      const Attended y = attention(x.q, x.k, x.v);
      run_backward(y.out_BSHD, x.d);
      return std::pair{y, x};
    };
    const Segments recurring({segments}, 2, 2 * chunk, whole.positions, kGpu, true), once({segments}, 2, 2 * chunk, whole.positions, kGpu);
    const auto [y32, x32] = pass(at::kFloat, [&](const auto&... qkv) { return attention_written_out(qkv..., once); });
    for (const Segments& seen : {recurring, once}) {
      SCOPED_TRACE(seen.recurring() ? "part by part" : "as rows");
      for (int time = 0; time < 2; ++time) {   // plans are kept
        const auto [y, x] = pass(at::kBFloat16, [&](const auto&... qkv) { return attention(qkv..., seen); });
        expect_near(y, x, y32, x32, "");
      }
    }
  }
}

// The kernels that join parts, against the forms written out in fp32: heads first or positions first in memory, parts of larger tensors,
// widths of few and many vectors, and what no kernel takes (five parts, a width of 12).
TEST(AttentionParts, AreTheFormulas) {
  const auto random = [](const Shape& shape, uint64_t seed) { return normal(shape, seed).to(at::kBFloat16).to(kGpu); };
  for (const auto& [b, h, s, d] : {std::tuple<int64_t, int64_t, int64_t, int64_t>{1, 1, 1, 8}, {2, 3, 37, 64}, {1, 16, 300, 128}, {3, 5, 65, 256}, {2, 2, 9, 12}}) {
    SCOPED_TRACE(testing::Message() << b << " x " << h << " heads x " << s << " positions x " << d);
    for (const bool positions_first : {false, true}) {
      const auto laid = [&](uint64_t seed) { return positions_first ? random({b, s, h, d}, seed).transpose(1, 2) : random({b, h, s, d}, seed); };
      const auto of_larger = [&](uint64_t seed) { return random({b, s + 5, h, d}, seed).transpose(1, 2).narrow(2, 3, s); };
      const auto sums = [&](uint64_t seed) { return (normal({b, h, s}, seed) * 20).to(kGpu); };
      const Dense x{laid(1), sums(2), {}, {}}, y{of_larger(3), sums(4), {}, {}};
      const Tensor around = at::full({b, s + 2, h, d}, 7.0, x.out_BHSD.options()), lse_around = at::full({b, h, s + 2}, 7.0, x.log_sum_exp_BHS.options());
      const Tensor out = around.narrow(1, 1, s).transpose(1, 2), lse = lse_around.narrow(2, 1, s), out32 = at::empty(out.sizes(), lse.options()), lse32 = at::empty_like(lse);
      merge_parts(out, lse, x, y);
      merge_parts_written_out(out32, lse32, {x.out_BHSD.to(at::kFloat), x.log_sum_exp_BHS, {}, {}}, {y.out_BHSD.to(at::kFloat), y.log_sum_exp_BHS, {}, {}});
      EXPECT_LE((out.to(at::kFloat) - out32).abs().max().item<float>(), 0x1p-8 * out32.abs().max().item<float>());
      EXPECT_LE((lse - lse32).abs().max().item<float>(), 1e-5);
      std::vector<Tensor> parts, parts32;
      for (uint64_t i = 0; i < 5; ++i) {
        parts.push_back(i % 2 == 0 ? laid(10 + i) : of_larger(10 + i)), parts32.push_back(parts.back().to(at::kFloat));
        sum_parts(out, parts);
        sum_parts_written_out(out32, parts32);
        EXPECT_TRUE(out.equal(out32.to(at::kBFloat16))) << parts.size() << " parts";
      }
      for (const int64_t edge : {int64_t{0}, s + 1}) {
        EXPECT_TRUE(around.select(1, edge).eq(7.0).all().item<bool>() && lse_around.select(2, edge).eq(7.0).all().item<bool>()) << "written beside it";
      }
    }
  }
}

// A gradient with other strides each time: cuDNN's plan for the shape is one.
TEST(AttentionKernels, TakeGradientsOfAnyStrides) {
  if (device::compute_capability(kGpu) < 90) GTEST_SKIP() << "cuDNN is not used here";
  const Form f{2, 192, 8, 4, 64};
  const Inputs x32(f, at::kFloat);
  run_backward(attention_written_out(x32.q, x32.k, x32.v).out_BSHD, x32.d);
  const auto with = [&](const std::function<Tensor(const Tensor&)>& as_laid_out) {
    const Inputs x(f);
    run_backward(attention(x.q, x.k, x.v, {}, cudnn).out_BSHD, as_laid_out(x.d));
    for (size_t i = 0; i < 3; ++i) EXPECT_LE(distance(x.gradients()[i], x32.gradients()[i]), 3 * 0x1p-8) << "gradient " << i;
  };
  with([](const Tensor& d) { return d; });
  with([](const Tensor& d) { return d.transpose(1, 2).contiguous().transpose(1, 2); });
  with([](const Tensor& d) { return d.transpose(2, 3).contiguous().transpose(2, 3); });
}

TEST(AttentionKernels, MakeTheHostWaitForNothing) {
  const Form f{2, 512, 16, 8, 128};
  for (const auto kernel : {automatic, flash}) {
    pass(Inputs(f), kernel);   // plans are made once
    const Inputs x(f);
    device::synchronize(kGpu);
    {
      const NoWaiting guard;
      EXPECT_NO_THROW(pass(x, kernel));
    }
  }
}

// [train] deterministic: the same bits, of gradients above all, where many blocks add to the same ones. cuDNN's forward then meets flash's
// backward, which is also the way out when cuDNN refuses backward alone.
TEST(AttentionKernels, AreRepeatableWhenAsked) {
  const Form f{2, 1536, 16, 8, 128};
  const Inputs x32(f, at::kFloat);
  const Attended y32 = attention_written_out(x32.q, x32.k, x32.v);
  run_backward(y32.out_BSHD, x32.d);
  device::set_deterministic(true);
  ASSERT_TRUE(device::deterministic());
  const Inputs first(f);
  const Attended y = pass(first, automatic);
  for (int time = 0; time < 5; ++time) {
    const Inputs again(f);
    const Attended same = pass(again, automatic);
    EXPECT_TRUE(same.out_BSHD.equal(y.out_BSHD) && same.log_sum_exp_BHS.equal(y.log_sum_exp_BHS));
    for (size_t i = 0; i < 3; ++i) EXPECT_TRUE(again.gradients()[i].equal(first.gradients()[i])) << "gradient " << i;
  }
  device::set_deterministic(false);
  expect_near(y, first, y32, x32, "deterministic");
}

// No test: milliseconds and TFLOP/s (causal). --gtest_also_run_disabled_tests --gtest_filter='*Times*'
TEST(AttentionKernels, DISABLED_Times) {
  std::printf("%-40s %-8s %16s %16s\n", "", "kernel", "forward", "backward");
  for (const Form& f : {Form{4, 4096, 16, 8, 128}, {1, 32768, 16, 8, 128}, {4, 4096, 40, 8, 128}}) {
    const Inputs x(f);
    for (const auto& [kernel, name] : {std::pair{cudnn, "cuDNN"}, {flash, "flash"}}) {
      std::vector<double> forward, backward;
      for (int i = 0; i < 13; ++i) {
        for (const Tensor& leaf : {x.q, x.k, x.projected}) leaf.mutable_grad() = Tensor();
        std::vector<c10::Event> events;
        const auto mark = [&] {
          events.emplace_back(at::kCUDA, c10::EventFlag::BACKEND_DEFAULT);
          events.back().record(c10::cuda::getCurrentCUDAStream(0));
        };
        device::synchronize(kGpu);
        mark();
        const Attended y = attention(x.q, x.k, x.v, {}, kernel);
        mark();
        run_backward(y.out_BSHD, x.d);
        mark();
        device::synchronize(kGpu);
        if (i < 3) continue;
        forward.push_back(events[0].elapsedTime(events[1]));
        backward.push_back(events[1].elapsedTime(events[2]));
      }
      const auto median = [](std::vector<double> x) { return std::nth_element(x.begin(), x.begin() + x.size() / 2, x.end()), x[x.size() / 2]; };
      const double flop = 2.0 * f.sequences * f.heads * f.width * f.positions * f.positions;
      const double there = median(forward), back = median(backward);
      std::printf("%ld x %6ld positions, %2ld/%ld heads of %3ld %8s %-8s %7.2f ms (%3.0f) %7.2f ms (%3.0f)\n", f.sequences, f.positions, f.heads,
                  f.groups, f.width, "", name, there, 1e-9 * flop / there, back, 2.5e-9 * flop / back);
    }
  }
}

}  // namespace
}  // namespace upcycle
