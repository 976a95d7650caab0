// The vocabulary cut over ranks: loss and gradients are the formula's on the whole, in any number of chunks, also where parts differ by a row.
#include "model/vocabulary.hpp"

#include <ATen/ops/log_softmax.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include "base/autograd.hpp"
#include "support/numbers.hpp"

namespace upcycle {
namespace {

TEST(VocabularyLossOnRanks, IsTheFormulaOnTheWhole) {
  const Communicator world = Communicator::everyone();
  const int64_t tokens = 29, vocab = 91, width = 12, ranks = world.size(), rank = world.rank();
  const int64_t size = vocab / ranks + (rank < vocab % ranks), first = rank * (vocab / ranks) + std::min(rank, vocab % ranks);
  const int64_t before = logits_bytes_on_cpu;
  for (const int64_t rows : {1, 4, 29}) {
    for (const double factor : {1.0, 40.0}) {   // also logits so far apart that some ranks' sums vanish beside others'
      SCOPED_TRACE(testing::Message() << rows << " rows at a time, logits times " << factor);
      logits_bytes_on_cpu = rows * ((vocab + ranks - 1) / ranks) * 4;
      const Tensor whole = normal({vocab, width}, 1) * factor, labels = at::randint(vocab, {tokens}, at::detail::createCPUGenerator(3), at::kLong);
      Tensor weight = at::ones({tokens});
      weight.narrow(0, 5, 4).zero_();
      const Tensor x64 = normal({tokens, width}, 2).to(at::kDouble).requires_grad_(), w64 = whole.to(at::kDouble).requires_grad_();
      const Tensor expected = (at::log_softmax(x64.matmul(w64.t()), -1).gather(1, labels.unsqueeze(1)).squeeze(1).neg() * weight).sum();
      expected.backward();

      Parameter head = trained(whole.narrow(0, first, size).clone());
      const Tensor x = normal({tokens, width}, 2).requires_grad_();
      const Tensor loss = vocabulary_loss(world, x, head, labels, weight, first, vocab);
      EXPECT_NEAR(loss.item<double>(), expected.item<double>(), 1e-5 * expected.item<double>());
      {
        const Unrecorded guard;
        EXPECT_EQ(vocabulary_loss(world, x, head, labels, weight, first, vocab).item<double>(), loss.item<double>()) << "looking on";
      }
      run_backward(loss, at::ones({}, at::kDouble));
      Tensor dx = x.grad().clone();   // each rank has the part of its own columns
      world.all_reduce(dx);
      EXPECT_LE(distance(dx, x64.grad()), 1e-5);
      EXPECT_LE(distance(head.main_grad, w64.grad().narrow(0, first, size)), 1e-5);
      EXPECT_EQ(head.additions, 1);
    }
  }
  logits_bytes_on_cpu = before;
}

}  // namespace
}  // namespace upcycle
