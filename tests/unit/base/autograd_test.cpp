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

}  // namespace
}  // namespace upcycle
