// The loss with its gradient and the embedding's gradient on a GPU against their plain forms; never all logits; the host waits for nothing.
#include <ATen/Context.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>

#include "base/autograd.hpp"
#include "model/vocabulary.hpp"
#include "ops/cross_entropy.hpp"
#include "ops/embedding.hpp"
#include "support/gpu_time.hpp"
#include "support/no_waiting.hpp"
#include "support/numbers.hpp"
#include "support/tensors.hpp"

namespace upcycle {
namespace {

const at::Device kGpu(at::kCUDA, 0);

bool same_on_gpu(const Tensor& a, const Tensor& b) { return same_bits(a.cpu(), b.cpu()); }

/// Logits of std 4, whose rows lie `stride` numbers apart; labels at both ends and elsewhere; weights some of which are 0.
struct Problem {
  Tensor logits, labels, weight;
  Problem(int64_t rows, int64_t columns, int64_t stride, at::ScalarType dtype, int64_t vocab, uint64_t seed = 1) {
    logits = at::empty({rows, stride}, at::TensorOptions(dtype).device(kGpu)).fill_(100.0).narrow(1, 0, columns);
    logits.copy_(normal({rows, columns}, seed).mul_(4));
    Tensor ids = at::randint(vocab, {rows}, at::detail::createCPUGenerator(seed), at::TensorOptions(at::kLong));
    if (rows > 1) ids[0] = 0, ids[1] = vocab - 1;
    labels = ids.to(kGpu);
    weight = normal({rows}, seed + 1).to(kGpu);
    if (rows > 2) weight[2] = 0.0;
  }
};

/// What lies between the rows is none of the kernel's business.
bool gaps_untouched(const Tensor& logits) {
  const int64_t columns = logits.size(1), stride = logits.stride(0);
  if (stride == columns || logits.size(0) == 0) return true;
  const Tensor gaps = at::empty({0}, logits.options()).set_(logits.storage(), columns, {logits.size(0), stride - columns}, {stride, 1});
  return gaps.eq(100.0).all().item<bool>();
}

constexpr struct Form {
  int64_t rows, columns, stride;
} kForms[] = {{1, 1, 1}, {5, 37, 37}, {5, 37, 40}, {1, 151936, 151936}, {9, 151936, 151936}, {4, 50257, 50264}, {3, 50257, 50257},
              {300, 1000, 1000}, {257, 4099, 4104}, {2, 300001, 300008}, {0, 64, 64}};

TEST(LossOnGpu, IsThePlainForm) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const Form& f : kForms) {
      SCOPED_TRACE(testing::Message() << dtype << ", " << f.rows << " rows of " << f.columns << ", " << f.stride << " apart");
      const Problem p(f.rows, f.columns, f.stride, dtype, f.columns);
      const Tensor x = p.logits.clone();
      const SoftmaxSums sums = softmax_sums(p.logits, p.labels), plain = softmax_sums_written_out(x, p.labels);
      EXPECT_TRUE(same_on_gpu(sums.largest_T, plain.largest_T));
      EXPECT_LE(distance(sums.sum_T, plain.sum_T), 2e-6);
      EXPECT_TRUE(same_on_gpu(sums.label_T, plain.label_T));
      const Tensor expected_loss = weighted_losses(plain, p.weight);
      Tensor expected = x.to(at::kFloat);   // never rounded: the kernel rounds once
      cross_entropy_gradient_written_out(expected, p.labels, p.weight, plain);

      const Problem once(f.rows, f.columns, f.stride, dtype, f.columns), half(f.rows, f.columns, f.stride, dtype, f.columns);
      EXPECT_LE(distance(cross_entropy(p.logits, p.labels, p.weight), expected_loss), 2e-6);
      EXPECT_LE(distance(p.logits, expected), dtype == at::kFloat ? 5e-6 : 0x1p-8);
      EXPECT_TRUE(gaps_untouched(p.logits));
      cross_entropy(once.logits, p.labels, p.weight);
      EXPECT_TRUE(same_on_gpu(once.logits, p.logits)) << "the same bits each time";
      cross_entropy_gradient(half.logits, p.labels, p.weight, sums);
      EXPECT_LE(distance(half.logits, expected), dtype == at::kFloat ? 5e-6 : 0x1p-8) << "in two passes";
      EXPECT_TRUE(gaps_untouched(half.logits));
      if (f.rows > 2) {
        EXPECT_EQ(p.logits[2].abs().sum().item<double>(), 0.0);
      }
    }
  }
}

// Of a vocabulary cut in four, the last part of one column: rows' sums and gradients of each part, labels that are elsewhere.
TEST(LossOnGpu, OfPartsOfTheColumns) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const int64_t rows = 33, vocab = 50001;
    const Problem p(rows, vocab, vocab, dtype, vocab);
    const SoftmaxSums whole = softmax_sums_written_out(p.logits, p.labels);
    Tensor expected = p.logits.to(at::kFloat, /*non_blocking=*/false, /*copy=*/true);
    cross_entropy_gradient_written_out(expected, p.labels, p.weight, whole);
    for (const auto& [first, size] : {std::pair<int64_t, int64_t>{0, 20000}, {20000, 12503}, {32503, 17497}, {50000, 1}}) {
      SCOPED_TRACE(testing::Message() << dtype << ", from " << first);
      const Tensor part = p.logits.narrow(1, first, size).clone();
      const SoftmaxSums sums = softmax_sums(part, p.labels, first), plain = softmax_sums_written_out(part, p.labels, first);
      EXPECT_TRUE(same_on_gpu(sums.largest_T, plain.largest_T));
      EXPECT_LE(distance(sums.sum_T, plain.sum_T), 2e-6);
      EXPECT_TRUE(same_on_gpu(sums.label_T, plain.label_T));
      cross_entropy_gradient(part, p.labels, p.weight, whole, first);
      EXPECT_LE(distance(part, expected.narrow(1, first, size)), dtype == at::kFloat ? 5e-6 : 0x1p-8);
    }
  }
}

TEST(LossOnGpu, FarOutAndNotANumber) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const int64_t columns : {8, 9, 40000}) {
      Tensor logits = at::zeros({4, columns}, at::TensorOptions(dtype));
      logits[0][0] = 1e4, logits[0][1] = -1e4;
      logits[1].fill_(-INFINITY), logits[1][3] = 2.0;
      logits[2][columns - 1] = NAN;
      logits[3].fill_(NAN);
      logits = logits.to(kGpu);
      const Tensor weight = at::ones({4});
      weight[3] = 0.0;
      const Tensor loss = cross_entropy(logits, at::full({4}, 1, at::kLong).to(kGpu), weight.to(kGpu)).cpu();
      EXPECT_NEAR(loss[0].item<float>(), 2e4, 100.0) << "1e4 in bf16 is 9984";
      EXPECT_EQ(loss[1].item<float>(), INFINITY);
      EXPECT_TRUE(std::isnan(loss[2].item<float>()));
      EXPECT_EQ(loss[3].item<float>(), 0.0F);
      const Tensor gradient = logits.cpu().to(at::kFloat);
      EXPECT_EQ(gradient[0][0].item<float>(), 1.0F);
      EXPECT_EQ(gradient[0][1].item<float>(), -1.0F);
      EXPECT_EQ(gradient[1][3].item<float>(), 1.0F);
      EXPECT_TRUE(gradient[2].isnan().all().item<bool>());
      EXPECT_EQ(gradient[3].abs().sum().item<float>(), 0.0F);
    }
  }
}

/// The head on a device; `rows` of logits at a time.
struct Outcome {
  double loss;
  Tensor dx, dw;
};
Outcome head(at::Device device, at::ScalarType dtype, at::ScalarType rounded, int64_t tokens, int64_t vocab, int64_t width, int64_t rows) {
  const auto draw = [&](const Shape& shape, uint64_t seed) { return normal(shape, seed).to(rounded).to(dtype).to(device); };
  // Logits of std 2 at width 64: where they are rounded to bf16, softmax moves by half a percent.
  Parameter weight = trained(draw({vocab, width}, 1) * 0.25);
  weight.main_grad.fill_(NAN);   // of an earlier step: the first chunk's product takes its place
  weight.outdated = true;
  const Tensor x = draw({tokens, width}, 2).requires_grad_(), labels = at::randint(vocab, {tokens}, at::detail::createCPUGenerator(3), at::kLong).to(device);
  Tensor learned = at::full({tokens}, 1.0 / static_cast<double>(tokens));
  if (tokens > 2) learned[1] = 0.0;
  int64_t& room = device.is_cuda() ? logits_bytes_on_gpu : logits_bytes_on_cpu;
  const int64_t before = room;
  room = rows * vocab * (dtype == at::kFloat ? 4 : 2);
  const Communicator alone;
  const Tensor sent = learned.to(device), one = at::ones({}, at::TensorOptions(at::kDouble).device(device));
  Tensor loss;
  for (int pass = 0; pass < 2; ++pass) {
    const auto go = [&] {
      loss = vocabulary_loss(alone, x, weight, labels, sent, 0, vocab);
      run_backward(loss, one);
    };
    if (device.is_cuda() && pass == 1) {
      const NoWaiting guard;
      go();
    } else {
      go();
    }
  }
  room = before;
  EXPECT_EQ(weight.additions, 2);
  return {loss.item<double>(), x.grad(), weight.main_grad};
}

TEST(LossOnGpu, TheHeadIsTheCpusInAnyNumberOfChunks) {
  for (const auto& [tokens, vocab, width] : {std::tuple<int64_t, int64_t, int64_t>{301, 1003, 64}, {1, 96, 32}, {40, 4099, 24}, {0, 96, 32}}) {
    for (const int64_t rows : {1, 7, 128, 1000}) {
      for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
        SCOPED_TRACE(testing::Message() << dtype << ", " << tokens << " tokens, " << vocab << " ids, " << rows << " rows at a time");
        const Outcome cpu = head(at::kCPU, at::kFloat, dtype, tokens, vocab, width, 1000), gpu = head(kGpu, dtype, dtype, tokens, vocab, width, rows);
        const double bound = dtype == at::kFloat ? 5e-6 : 3 * 0x1p-8;   // logits, their gradient and dx are rounded
        EXPECT_NEAR(gpu.loss, cpu.loss, bound * cpu.loss);
        EXPECT_LE(distance(gpu.dx, cpu.dx), bound);
        EXPECT_LE(distance(gpu.dw, cpu.dw), bound);
        const Outcome again = head(kGpu, dtype, dtype, tokens, vocab, width, rows);
        EXPECT_EQ(again.loss, gpu.loss);
        EXPECT_TRUE(same_on_gpu(again.dx, gpu.dx) && same_on_gpu(again.dw, gpu.dw)) << "two runs, the same bits";
      }
    }
  }
}

TEST(LossOnGpu, AnotherGradientThanOneGivesNoNumbers) {
  Parameter weight = trained(normal({40, 16}, 1, at::kBFloat16).to(kGpu));
  const Communicator alone;
  for (const double gradient : {1.0, 0.5, 0.0}) {
    const Tensor x = normal({5, 16}, 2, at::kBFloat16).to(kGpu).requires_grad_();
    const Tensor loss = vocabulary_loss(alone, x, weight, at::zeros({5}, at::kLong).to(kGpu), at::ones({5}).to(kGpu), 0, 40);
    run_backward(loss, at::full({}, gradient, at::kDouble).to(kGpu));
    EXPECT_EQ(x.grad().isnan().all().item<bool>(), gradient != 1.0) << gradient;
    EXPECT_EQ(x.grad().isfinite().all().item<bool>(), gradient == 1.0) << gradient;
  }
}

TEST(EmbeddingOnGpu, IsThePlainFormAndTheSameEachTime) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const auto& [tokens, vocab, width] : {std::tuple<int64_t, int64_t, int64_t>{1, 7, 1}, {0, 7, 8}, {153, 37, 9}, {5000, 900, 260}, {4097, 3, 64},
                                               {3000, 20000, 2048}, {2000, 1, 1024}, {64, 100000, 12}}) {
      SCOPED_TRACE(testing::Message() << dtype << ", " << tokens << " tokens, " << vocab << " ids, width " << width);
      const Tensor ids = at::randint(vocab, {tokens}, at::detail::createCPUGenerator(3), at::kLong).to(kGpu);
      const Tensor dy = normal({tokens, width}, 1, dtype).to(kGpu);
      const Tensor before = at::ones({vocab, width}, dy.options().dtype(at::kFloat));
      const Tensor ours = before.clone(), again = before.clone(), plain = before.to(at::kCPU).to(at::kDouble);
      {
        const NoWaiting guard;
        add_embedding_gradient(ours, dy, ids);
      }
      add_embedding_gradient(again, dy, ids);
      plain.index_add_(0, ids.cpu(), dy.cpu().to(at::kDouble));
      EXPECT_LE(distance(ours, plain), 1e-6);
      EXPECT_TRUE(same_on_gpu(ours, again));
    }
  }
}

// Asserts nothing: figures for people, beside a copy's rate on the same card.
TEST(LossOnGpu, Rates) {
  const at::TensorOptions half = at::TensorOptions(at::kBFloat16).device(kGpu), whole = half.dtype(at::kFloat);
  const int64_t rows = 1664, vocab = 151936, width = 2048, tokens = 16384;
  const Tensor logits = at::randn({rows, vocab}, half), other = at::empty_like(logits), weight = at::full({rows}, 1e-4, whole);
  const Tensor labels = at::randint(vocab, {rows}, half.dtype(at::kLong));
  const double bytes = static_cast<double>(logits.nbytes()), copy = seconds([&] { other.copy_(logits); });
  std::printf("copy                     %8.3f ms  %5.2f TB/s read and written\n", 1e3 * copy, 2e-12 * bytes / copy);
  const double both = seconds([&] { cross_entropy(logits, labels, weight); }), sums = seconds([&] { softmax_sums(logits, labels); });
  std::printf("loss and gradient        %8.3f ms  %5.2f TB/s (read once, written once), %.0f %% of a copy\n", 1e3 * both, 2e-12 * bytes / both, 100 * copy / both);
  std::printf("sums of rows             %8.3f ms  %5.2f TB/s (read once)\n", 1e3 * sums, 1e-12 * bytes / sums);
  const SoftmaxSums of_rows = softmax_sums(logits, labels);
  const double gradient = seconds([&] { cross_entropy_gradient(logits, labels, weight, of_rows); });
  std::printf("gradient alone           %8.3f ms  %5.2f TB/s\n", 1e3 * gradient, 2e-12 * bytes / gradient);

  const Tensor dy = at::randn({tokens, width}, half), main_grad = at::zeros({vocab, width}, whole);
  const Tensor ids = at::randint(vocab, {tokens}, half.dtype(at::kLong)), one = at::zeros({tokens}, half.dtype(at::kLong));
  std::printf("embedding's gradient     %8.3f ms; all ids equal %.3f ms; plain form %.3f ms\n", 1e3 * seconds([&] { add_embedding_gradient(main_grad, dy, ids); }),
              1e3 * seconds([&] { add_embedding_gradient(main_grad, dy, one); }), 1e3 * seconds([&] { add_embedding_gradient_written_out(main_grad, dy, ids); }));

  Parameter head{at::randn({vocab, width}, half).mul_(0.02), {}, main_grad, 0};
  const Tensor x = at::randn({tokens, width}, half).requires_grad_(), all = at::randint(vocab, {tokens}, half.dtype(at::kLong));
  const Tensor learned = at::full({tokens}, 1.0 / tokens, whole), start = at::ones({}, whole.dtype(at::kDouble));
  const Communicator alone;
  const int64_t before = logits_bytes_on_gpu;
  for (const int64_t mib : {256, 512, 1024, 2048}) {
    logits_bytes_on_gpu = mib << 20;
    const double head_seconds = seconds([&] { run_backward(vocabulary_loss(alone, x, head, all, learned, 0, vocab), start); });
    std::printf("head and loss, both ways %8.3f ms  %4.0f TFLOP/s, chunks of at most %lld MiB\n", 1e3 * head_seconds,
                6e-12 * static_cast<double>(tokens) * vocab * width / head_seconds, static_cast<long long>(mib));
  }
  logits_bytes_on_gpu = before;
}

}  // namespace
}  // namespace upcycle
