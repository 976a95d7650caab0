#include "base/autograd.hpp"

#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <memory>

namespace upcycle {
namespace {

Tensor leaf() { return at::ones({3}).requires_grad_(); }
void run_backward(const std::vector<Tensor>& outputs, bool keep = false) {
  std::vector<Tensor> ones;
  for (const Tensor& output : outputs) ones.push_back(at::ones(output.sizes()));
  torch::autograd::backward(outputs, ones, keep);
}

Tensor times_two(const Tensor& x) {
  Tensor y;
  {
    const Unrecorded guard;
    y = x * 2;
  }
  return record(y, {x}, [](const std::vector<Tensor>& dy) -> Gradients { return {dy[0] * 2}; });
}

TEST(Record, AnOpIsPartOfAtensGraph) {
  const Tensor x = leaf();
  run_backward({(times_two(x * 3) * 5).sum()});
  EXPECT_TRUE(x.grad().equal(at::ones({3}) * 30));
}

TEST(Record, BackwardRunsOnce) {
  const Tensor x = leaf(), y = times_two(x).sum();
  run_backward({y}, /*keep=*/true);
  EXPECT_THROW(run_backward({y}), std::logic_error);
}

/// What a backward function holds: alive as long as it is.
struct Token {};

TEST(Record, FreesItsCaptures) {
  const auto token = std::make_shared<Token>();
  const std::weak_ptr<Token> watch = token;
  const auto recorded = [&](std::shared_ptr<Token> held) {
    const Tensor x = leaf();
    Tensor raw;
    {
      const Unrecorded guard;
      raw = x * 2;
    }
    return record(raw, {x}, [raw, held](const std::vector<Tensor>& dy) -> Gradients {
      return {dy[0] * raw};
    });  // keeps its own output
  };
  {
    const Tensor y = recorded(token).sum();
    EXPECT_EQ(watch.use_count(), 2);
    run_backward({y});
    EXPECT_EQ(watch.use_count(), 1) << "still held after backward, by a graph that is alive";
  }
  recorded(token);
  EXPECT_EQ(watch.use_count(), 1) << "still held after the outputs have gone, backward never having run";
}

TEST(Record, NothingIsHeldWhereNothingIsRecorded) {
  const auto token = std::make_shared<Token>();
  const Unrecorded guard;
  EXPECT_FALSE(recording());
  const Tensor y = record(at::ones({3}), {leaf()}, [token](const std::vector<Tensor>&) -> Gradients { return {}; });
  EXPECT_EQ(token.use_count(), 1);
  EXPECT_FALSE(y.requires_grad());
}

TEST(Record, UnrecordedEndsAlsoByAnException) {
  try {
    const Unrecorded outer;
    const Unrecorded inner;
    throw std::runtime_error("");
  } catch (const std::runtime_error&) {
  }
  EXPECT_TRUE(recording());
}

TEST(Record, OutputsNobodyUsedHaveUndefinedGradients) {
  const Tensor x = leaf();
  std::vector<bool> defined;
  const auto outputs = record({at::ones({3}), at::ones({3}) * 2}, {x}, [&](const std::vector<Tensor>& dy) -> Gradients {
    for (const Tensor& d : dy) defined.push_back(d.defined());
    return {dy[1] * 7};
  });
  run_backward({outputs[1].sum()});
  EXPECT_EQ(defined, (std::vector<bool>{false, true}));
  EXPECT_TRUE(x.grad().equal(at::ones({3}) * 7));
}

TEST(Record, AnInputMayGetNoGradient) {
  const Tensor x = leaf(), z = leaf();
  run_backward({record(at::ones({3}), {x, z}, [](const std::vector<Tensor>& dy) -> Gradients {
                  return {Tensor(), dy[0]};
                }).sum()});
  EXPECT_FALSE(x.grad().defined());
  EXPECT_TRUE(z.grad().defined());
}

TEST(GraphEnd, BackwardNeedsNoOutput) {
  const auto token = std::make_shared<Token>();
  const Tensor x = leaf();
  GraphEnd end = [&] {
    const Tensor y = record(at::ones({3}), {x * 2}, [token](const std::vector<Tensor>& dy) -> Gradients { return {dy[0] * 5}; });
    return GraphEnd(y + 1);
  }();
  end.backward(at::full({3}, 7.0f));
  EXPECT_TRUE(x.grad().equal(at::full({3}, 70.0f)));
  EXPECT_EQ(token.use_count(), 1) << "the graph is freed";
  EXPECT_THROW(end.backward(at::ones({3})), std::logic_error) << "once only";
  GraphEnd other(leaf() * 2);
  EXPECT_ANY_THROW(other.backward(at::ones({4}))) << "a gradient of another shape";
}

TEST(Record, RunsThoughNoInputIsDifferentiable) {
  bool ran = false;
  const Tensor y = record(at::ones({3}), {}, [&](const std::vector<Tensor>&) -> Gradients {
    EXPECT_FALSE(recording());
    ran = true;
    return {};
  });
  EXPECT_TRUE(y.requires_grad());
  run_backward({y.sum()});
  EXPECT_TRUE(ran);
}

TEST(Record, ErrorsOfBackwardComeOutAsTheyAre) {
  const Tensor y =
      record(at::ones({3}), {leaf()}, [](const std::vector<Tensor>&) -> Gradients { throw std::domain_error("mine"); });
  EXPECT_THROW(run_backward({y.sum()}), std::domain_error);
}

/// x^2 the hand-written way: keeps x.
Tensor squared(const Tensor& x) {
  Tensor y;
  {
    const Unrecorded guard;
    y = x * x;
  }
  return record(y, {x}, [x = x.detach()](const std::vector<Tensor>& dy) -> Gradients { return {dy[0] * x * 2}; });
}

TEST(Recomputed, GradientsAreThoseOfTheFunctionAndItRunsTwice) {
  const Tensor x = leaf(), z = leaf() * 1;
  int runs = 0;
  const auto function = [&runs](const std::vector<Tensor>& in) {
    ++runs;
    return squared(squared(in[0]) + in[0] * in[1]);
  };
  Tensor y;
  {
    const Unrecorded guard;
    y = function({x, z});
  }
  y = recomputed(y, {x, z}, [&](const std::vector<Tensor>& in) {
    EXPECT_TRUE(recording());
    return function(in);
  });
  EXPECT_EQ(runs, 1);
  run_backward({(y * 3).sum()});
  EXPECT_EQ(runs, 2);
  const Tensor same = leaf();
  run_backward({(function({same, at::ones({3})}) * 3).sum()});
  EXPECT_TRUE(x.grad().equal(same.grad()));
}

TEST(Recomputed, KeepsItsInputsOnlyUntilBackward) {
  const auto token = std::make_shared<Token>();
  const Tensor x = leaf();
  const Tensor y = recomputed(at::ones({3}), {x}, [token](const std::vector<Tensor>& in) { return squared(in[0]); });
  EXPECT_EQ(token.use_count(), 2);
  run_backward({y.sum()});
  EXPECT_EQ(token.use_count(), 1);
}

TEST(Recomputed, OfOneInsideAnotherAndErrorsComeOut) {
  const Tensor x = leaf();
  const auto inner = [](const std::vector<Tensor>& in) { return squared(in[0]); };
  const auto outer = [inner](const std::vector<Tensor>& in) { return recomputed(at::ones({3}), {in[0] * 5}, inner); };
  run_backward({recomputed(at::ones({3}), {x}, outer).sum()});
  EXPECT_TRUE(x.grad().equal(at::ones({3}) * 50));
  const Tensor bad = recomputed(at::ones({3}), {x}, [](const auto&) -> Tensor { throw std::domain_error("mine"); });
  EXPECT_THROW(run_backward({bad.sum()}), std::domain_error);
}

TEST(Remade, MemoryGoesAndComesBackInTime) {
  const Tensor x = leaf();
  Remade remade(true);
  const Tensor a = x * 3, raw = a.detach();
  remade.add(a, [x = x.detach()] { return x * 3; });
  const Tensor b = squared(a), raw_b = b.detach();
  remade.add(b, [raw] { return raw * raw; });   // from one that was added before
  const Tensor y = remade.before(squared(b) * 2);
  EXPECT_EQ(raw.storage().nbytes(), 0U);
  EXPECT_EQ(raw_b.storage().nbytes(), 0U);
  run_backward({y.sum()});
  EXPECT_TRUE(raw.equal(at::ones({3}) * 3));
  EXPECT_TRUE(x.grad().equal(at::ones({3}) * (2 * 81 * 4)));   // 2 (3x)^4
}

TEST(Remade, TwiceTheSameStorageCountsOnceAndOffIsOff) {
  const Tensor x = leaf(), a = x * 3, raw = a.detach();
  Remade remade(true), off(false);
  remade.add(a, [x = x.detach()] { return x * 3; });
  remade.add(a.view({3, 1}), []() -> Tensor { throw std::logic_error("not the first"); });
  off.add(a, []() -> Tensor { throw std::logic_error("off"); });
  const Tensor y = squared(a);
  EXPECT_TRUE(off.before(y).is_same(y));
  run_backward({remade.before(y).sum()});
  EXPECT_TRUE(x.grad().equal(at::ones({3}) * 18));
  const Unrecorded guard;
  Remade unrecorded(true);
  unrecorded.add(raw, []() -> Tensor { throw std::logic_error("not recording"); });
  EXPECT_TRUE(unrecorded.before(y).is_same(y));
  EXPECT_TRUE(raw.equal(at::ones({3}) * 3));
}

TEST(Remade, RefusesWhatCameOutAnother) {
  const Tensor x = leaf(), a = x * 3;
  Remade remade(true);
  remade.add(a, [] { return at::ones({4}); });
  EXPECT_THROW(run_backward({remade.before(squared(a)).sum()}), std::logic_error);
}

}  // namespace
}  // namespace upcycle
