// The head and the loss, chunk by chunk: the same numbers however many chunks, and never all logits.
#include "model/vocabulary.hpp"

#include <ATen/ops/full.h>
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/zeros.h>

#include <cmath>

#include "base/autograd.hpp"
#include "support/stage_pass.hpp"

namespace upcycle {
namespace {

constexpr int64_t kTokens = 53, kVocab = 96, kWidth = 12;

/// Lowers the room for logits to `rows` rows of fp32 while it lives.
class Room {
 public:
  explicit Room(int64_t rows) : before_(logits_bytes_on_cpu) { logits_bytes_on_cpu = rows * kVocab * 4; }
  ~Room() { logits_bytes_on_cpu = before_; }

 private:
  int64_t before_;
};

struct Head {
  Communicator alone;
  Parameter weight;
  Tensor x, labels = at::randint(kVocab, {kTokens}, at::detail::createCPUGenerator(3), at::kLong), learned = at::ones({kTokens});
  explicit Head(at::ScalarType dtype = at::kFloat) : weight(trained(normal({kVocab, kWidth}, 1, dtype) * 0.25)), x(normal({kTokens, kWidth}, 2, dtype).requires_grad_()) {
    learned.narrow(0, 3, 7).zero_();
    learned.mul_(0.25);
  }
  Tensor loss() { return vocabulary_loss(alone, x, weight, labels, learned, 0, kVocab); }
};

TEST(VocabularyLoss, IsTheFormulaInAnyNumberOfChunks) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const int64_t rows : {1, 2, 9, 52, 53, 1000}) {
      SCOPED_TRACE(testing::Message() << dtype << ", " << rows << " rows at a time");
      const Room room(dtype == at::kFloat ? rows : (rows + 1) / 2);
      Head head(dtype);
      const Tensor x64 = head.x.detach().to(at::kDouble).requires_grad_(), w64 = head.weight.value.to(at::kDouble).requires_grad_();
      const Tensor expected = (at::log_softmax(x64.matmul(w64.t()), -1).gather(1, head.labels.unsqueeze(1)).squeeze(1).neg() * head.learned).sum();
      expected.backward();
      const double bound = dtype == at::kFloat ? 2e-6 : 2 * 0x1p-8;
      head.weight.main_grad.fill_(NAN);   // of an earlier step: the first chunk's product takes its place
      head.weight.outdated = true;
      for (int64_t pass = 1; pass <= 2; ++pass) {
        const Tensor loss = head.loss();
        EXPECT_EQ(loss.scalar_type(), at::kDouble);
        EXPECT_NEAR(loss.item<double>(), expected.item<double>(), bound * expected.item<double>());
        EXPECT_EQ(head.weight.additions, pass - 1) << "ready is backward's to say";
        run_backward(loss, at::ones({}, at::kDouble));
        EXPECT_EQ(head.weight.additions, pass);
      }
      EXPECT_EQ(head.x.grad().scalar_type(), dtype);
      EXPECT_LE(distance(head.x.grad(), 2 * x64.grad()), bound);
      EXPECT_LE(distance(head.weight.main_grad, 2 * w64.grad()), bound);
    }
  }
}

TEST(VocabularyLoss, TakesOnlyTheGradientThatItKnew) {
  for (const double gradient : {0.5, -1.0, 0.0}) {
    Head head;
    const Tensor loss = head.loss();
    EXPECT_THROW(run_backward(loss, at::full({}, gradient, at::kDouble)), std::logic_error) << gradient;
    EXPECT_EQ(head.weight.additions, 0);
  }
  Head scaled;
  EXPECT_THROW(run_backward(scaled.loss() * 2.0, at::ones({}, at::kDouble)), std::logic_error);
}

TEST(VocabularyLoss, WithoutRecordingOnlyTheLoss) {
  Head head;
  const double expected = head.loss().item<double>();
  head.weight.main_grad.zero_();
  const Unrecorded guard;
  const Room room(5);
  EXPECT_NEAR(head.loss().item<double>(), expected, 1e-6 * expected);
  EXPECT_EQ(head.weight.main_grad.abs().sum().item<float>(), 0.0F);
  head.weight.main_grad = Tensor();   // a model that is only looked at
  EXPECT_NEAR(head.loss().item<double>(), expected, 1e-6 * expected);
}

TEST(VocabularyLoss, OfNoTokens) {
  Head head;
  head.x = at::zeros({0, kWidth}).requires_grad_(), head.labels = at::zeros({0}, at::kLong), head.learned = at::zeros({0});
  head.weight.main_grad.fill_(NAN);
  head.weight.outdated = true;
  const Tensor loss = head.loss();
  EXPECT_EQ(loss.item<double>(), 0.0);
  run_backward(loss, at::ones({}, at::kDouble));
  EXPECT_EQ(head.x.grad().numel(), 0);
  EXPECT_EQ(head.weight.main_grad.abs().sum().item<float>(), 0.0F);
  EXPECT_EQ(head.weight.additions, 1);
}

// In fp32 on a CPU a chunk stands there three times over: logits, shifted logits, exponentials.
TEST(VocabularyLoss, NeverHoldsAllLogits) {
  counting();
  const int64_t tokens = 4096, logits = tokens * kVocab * 4;
  Head head;
  head.x = normal({tokens, kWidth}, 4).requires_grad_();
  head.labels = at::randint(kVocab, {tokens}, at::detail::createCPUGenerator(3), at::kLong), head.learned = at::ones({tokens});
  const auto peak = [&](int64_t rows) {
    const Room room(rows);
    const int64_t before = Counting::live;
    Counting::peak = before;
    const Tensor loss = head.loss();
    EXPECT_LE(Counting::live - before, tokens * kWidth * 4 + 256) << "kept for backward: the gradient of x";
    const int64_t most = Counting::peak - before;
    run_backward(loss, at::ones({}, at::kDouble));
    return most;
  };
  EXPECT_GT(peak(tokens), logits);
  EXPECT_LT(peak(64), logits / 4);
}

TEST(RowsAtATime, AreEqualChunksThatFit) {
  const int64_t gpu = logits_bytes_on_gpu;
  for (const int64_t rows : {1, 100, 4096, 16384, 16385, 1000000}) {
    for (const auto& [vocab, width] : {std::pair<int64_t, int64_t>{151936, 2}, {151936, 4}, {96, 2}, {37984, 2}}) {
      const int64_t step = rows_at_a_time(rows, vocab, width, true);
      EXPECT_LE(step * vocab * width, gpu);
      EXPECT_GE(step, 1);
      EXPECT_LE(step, rows);
      const int64_t chunks = (rows + step - 1) / step, fewest = (rows * vocab * width + gpu - 1) / gpu;
      EXPECT_LE(chunks, fewest + 1) << rows << " of " << vocab;
    }
  }
  EXPECT_EQ(rows_at_a_time(16384, 151936, 2, true), 3328);
  EXPECT_EQ(rows_at_a_time(0, 151936, 2, true), 1);
  EXPECT_EQ(rows_at_a_time(10, int64_t{1} << 40, 4, true), 1) << "one row must fit";
}

}  // namespace
}  // namespace upcycle
