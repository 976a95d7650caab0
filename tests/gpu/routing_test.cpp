// The router's kernels against the same written out in tensors on the same GPU, and its product against fp64.
#include <ATen/Context.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/where.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>

#include "base/autograd.hpp"
#include "moe/router.hpp"
#include "ops/linear.hpp"
#include "ops/router_product.hpp"
#include "ops/routing.hpp"
#include "support/no_waiting.hpp"
#include "support/numbers.hpp"

// Shapes: T tokens, K choices of each, E experts, D width.
namespace upcycle {
namespace {

const at::Device kGpu(at::kCUDA, 0);
const Communicator alone;

/// Normal numbers made on the GPU, the same in every run.
Tensor draw(const Shape& shape, uint64_t seed) { return normal(shape, seed).to(kGpu); }

double norm(const Tensor& x) { return x.to(at::kDouble).norm().item<double>(); }

/// Logits of every kind: clear ones, ties of many kinds, and far apart.
std::vector<std::pair<const char*, Tensor>> all_logits(int64_t tokens, int64_t experts) {
  const Tensor smooth = draw({tokens, experts}, 1);
  const Tensor zeros = at::zeros({tokens, experts}, smooth.options());
  std::vector<std::pair<const char*, Tensor>> all = {{"smooth", smooth},
                                                     {"few values, both zeros", (smooth * 2).round() / 2},
                                                     {"negative", -smooth.abs() - 1},
                                                     {"below the normal numbers", smooth * 1e-38},
                                                     {"far apart", smooth * 1e3},
                                                     {"all equal", zeros + 0.25},
                                                     {"zeros of both signs", at::where(smooth.gt(0), zeros, -zeros)}};
  if (experts % 2 == 0) all.emplace_back("shards of a copy tied", draw({tokens, experts / 2}, 2).repeat_interleave(2, 1));
  return all;
}

struct Outcome {
  Routing routing;
  Tensor d_logits, count_E, measures_3;
};

struct Setting {
  int64_t top_k = 1;
  bool renormalise = true;
  RouterContext context;
  RouterState state;
  bool recording = true;
};

/// Two micro-batches of the same tokens through a router of its own; the last one's results, the statistics of both.
Outcome run(const Setting& s, const Tensor& logits, const Tensor& dw, bool kernel) {
  Parameter unused;
  Router router(unused, alone, {.top_k = s.top_k, .renormalise = s.renormalise});
  router.state() = s.state;
  Outcome out;
  for (int micro_batch = 0; micro_batch < 2; ++micro_batch) {
    const Tensor leaf = (micro_batch == 0 ? logits.flip({0}) : logits).detach().clone().requires_grad_();
    out.routing = kernel ? router.route(leaf, s.context) : router.route_written_out(leaf, s.context);
    run_backward(out.routing.weight_TK, dw);
    out.d_logits = leaf.grad();
  }
  out.count_E = router.statistics().count_E;
  out.measures_3 = router.statistics().measures_3;
  return out;
}

void expect_near(const Tensor& a, const Tensor& b, double relative, double absolute, const char* what) {
  ASSERT_EQ(a.sizes(), b.sizes()) << what;
  if (a.numel() == 0) return;
  EXPECT_LE(norm(a.to(at::kDouble) - b.to(at::kDouble)), relative * norm(b) + absolute) << what;
}

void expect_same(const Setting& s, const Tensor& logits) {
  const int64_t tokens = logits.size(0), experts = logits.size(1);
  ASSERT_TRUE(routes_in_one_pass(logits));
  const Tensor dw = draw({tokens, s.top_k}, 9);
  const Outcome a = run(s, logits, dw, true), b = run(s, logits, dw, false);
  EXPECT_TRUE(a.routing.expert_TK.equal(b.routing.expert_TK));
  EXPECT_TRUE(a.routing.count_E.equal(b.routing.count_E));
  EXPECT_EQ(a.routing.weight_TK.scalar_type(), at::kFloat);
  expect_near(a.routing.weight_TK, b.routing.weight_TK, 1e-6, 0, "weights");
  // What is left of a gradient that is nothing: T * E roundings of probability * E * share / T, about 1 / (T * E) each; and, where one
  // expert has all the weight, those of d_weight less the mean of d_weight.
  const double nothing = tokens == 0 ? 0 : 1e-6 / std::sqrt(static_cast<double>(experts * tokens)) + 0x1p-24 * norm(dw);
  expect_near(a.d_logits, b.d_logits, 1e-5, nothing, "gradient of the logits");
  EXPECT_TRUE(a.count_E.equal(b.count_E));
  EXPECT_EQ(a.measures_3.scalar_type(), at::kDouble);
  const Tensor x = a.measures_3.cpu(), y = b.measures_3.cpu();
  const double largest = tokens == 0 ? 0 : logits.abs().max().item<double>();   // the entropy is a difference of two such numbers
  for (int i = 0; i < 3; ++i) {
    const double p = x[i].item<double>(), q = y[i].item<double>();
    if (tokens == 0) {
      EXPECT_EQ(std::isnan(p), std::isnan(q)) << "measure " << i;
    } else {
      EXPECT_NEAR(p, q, 2e-6 * (2 + std::abs(q) + (i == 2 ? largest : 0))) << "measure " << i;
    }
  }
  // The last bit does not depend on the order in which blocks come.
  if (tokens > 0 && tokens < 1000) return;
  const Outcome again = run(s, logits, dw, true);
  EXPECT_TRUE(again.d_logits.equal(a.d_logits) && again.routing.weight_TK.equal(a.routing.weight_TK));
  EXPECT_TRUE(tokens == 0 || again.measures_3.equal(a.measures_3));
}

constexpr std::array<int64_t, 9> kExperts = {2, 4, 8, 20, 60, 64, 128, 200, 1000};
constexpr std::array<int64_t, 4> kTokens = {0, 1, 33, 4096};

TEST(RoutingOnGpu, ChoosesAndWeighsAsWrittenOut) {
  for (const int64_t experts : kExperts) {
    for (const int64_t tokens : kTokens) {
      bool renormalise = true;   // in turns: each kind of logits meets both over the K
      for (const auto& [kind, logits] : all_logits(tokens, experts)) {
        for (const int64_t top_k : {1, 2, 8, 40}) {
          if (top_k > experts || (top_k == 40 && tokens > 33)) continue;
          renormalise = !renormalise;
          SCOPED_TRACE(testing::Message() << experts << " experts, top " << top_k << ", " << tokens << " tokens, " << kind
                                          << (renormalise ? ", renormalised" : ""));
          expect_same({.top_k = top_k, .renormalise = renormalise}, logits);
        }
      }
    }
  }
}

TEST(RoutingOnGpu, AllExpertsAreChosenInTheirOrder) {
  for (const int64_t experts : {2, 5, 20, 64, 1000}) {
    for (const auto& [kind, logits] : all_logits(33, experts)) {
      SCOPED_TRACE(testing::Message() << experts << " experts, " << kind);
      expect_same({.top_k = experts}, logits);
    }
  }
}

/// Which sequence each of the tokens is of: blocks of equal length, blocks that end anywhere, and turns (as on no rank so far).
std::vector<std::pair<int64_t, Tensor>> sequences(int64_t tokens) {
  const Tensor t = at::arange(tokens, at::TensorOptions(at::kLong).device(kGpu));
  const auto blocks = [&](int64_t count) { return (t * count).div(std::max<int64_t>(tokens, 1), "floor"); };
  return {{4, blocks(4)}, {3, blocks(3)}, {5, t.remainder(5)}};
}

TEST(RoutingOnGpu, BalanceLossesAreThoseWrittenOut) {
  for (const int64_t experts : {int64_t{4}, int64_t{8}, int64_t{60}, int64_t{128}, int64_t{1000}}) {
    for (const int64_t tokens : kTokens) {
      const Tensor last_E = at::arange(1, experts + 1, at::TensorOptions(at::kLong).device(kGpu));
      std::vector<std::pair<BalanceLoss, Tensor>> losses;   // with the choices of the last step
      for (const auto& [aux, z] : {std::pair{0.7, 0.0}, {0.0, 0.3}, {0.7, 0.3}}) {
        losses.push_back({{.aux = aux, .z = z}, {}});
        losses.push_back({{.aux = aux, .z = z, .scope = BalanceScope::global}, {}});
        losses.push_back({{.aux = aux, .z = z, .scope = BalanceScope::global}, last_E});
        for (const auto& [count, sequence_T] : sequences(tokens)) {
          losses.push_back({{.aux = aux, .z = z, .scope = BalanceScope::sequence, .sequences = count, .sequence_T = sequence_T}, {}});
        }
      }
      const Tensor logits = draw({tokens, experts}, 3) * 3, others = draw({tokens, experts}, 4);
      for (const auto& [loss, last] : losses) {
        for (const bool renormalise : {true, false}) {
          SCOPED_TRACE(testing::Message() << experts << " experts, " << tokens << " tokens, scope " << static_cast<int>(loss.scope) << ", "
                                          << loss.sequences << " sequences, aux " << loss.aux << ", z " << loss.z
                                          << (renormalise ? ", renormalised" : ""));
          Setting s{.top_k = 2, .renormalise = renormalise, .context = {.balance = loss}};
          s.state.count_E = last;
          expect_same(s, logits);
          s.top_k = 1;   // renormalised: a weight of 1, and the losses' gradient alone
          if (renormalise) expect_same(s, others);
        }
      }
    }
  }
}

TEST(RoutingOnGpu, ABiasChoosesAndDoesNotWeigh) {
  for (const int64_t experts : {4, 8, 60, 128, 1000}) {
    for (const auto& [kind, logits] : all_logits(257, experts)) {
      SCOPED_TRACE(testing::Message() << experts << " experts, " << kind);
      Setting s{.top_k = 3, .renormalise = false, .context = {.balance = {.aux = 0.5, .z = 0.1}}};
      s.state.bias_E = (draw({experts}, 5) * 2).round() / 4;
      expect_same(s, logits);
      s.renormalise = true;
      s.state.bias_E = draw({experts}, 5) * 100;   // chosen logits may be far below the largest
      expect_same(s, logits);
      s.state.bias_E = at::zeros({experts}, logits.options());
      expect_same(s, logits);
    }
  }
}

TEST(RoutingOnGpu, ASavedChoiceIsNotMadeAgain) {
  for (const auto& [experts, top_k] : {std::pair{4, 2}, {64, 8}, {60, 40}, {1000, 8}}) {
    SCOPED_TRACE(testing::Message() << experts << " experts, top " << top_k);
    const Tensor logits = draw({300, experts}, 6) * 2, other = draw({300, experts}, 7);
    for (const bool renormalise : {true, false}) {
      Setting s{.top_k = top_k, .renormalise = renormalise, .context = {.balance = {.aux = 0.5, .z = 0.1}}};
      s.context.expert_TK = choose_experts(other, top_k);
      expect_same(s, logits);
      const Outcome given = run(s, logits, draw({300, top_k}, 9), true);
      EXPECT_TRUE(given.routing.expert_TK.equal(choose_experts(other, top_k)));
      // The second pass over the same tokens gives the first one's bits.
      s.context.expert_TK = Tensor();
      const Outcome first = run(s, logits, draw({300, top_k}, 9), true);
      s.context.expert_TK = first.routing.expert_TK;
      Parameter unused;
      Router router(unused, alone, {.top_k = top_k, .renormalise = renormalise});
      const Tensor leaf = logits.detach().requires_grad_();
      const Routing second = router.route(leaf, s.context);
      run_backward(second.weight_TK, draw({300, top_k}, 9));
      EXPECT_TRUE(second.weight_TK.equal(first.routing.weight_TK));
      EXPECT_TRUE(second.count_E.equal(first.routing.count_E));
      EXPECT_TRUE(leaf.grad().equal(first.d_logits));
    }
  }
}

TEST(RoutingOnGpu, WithoutRecordingNothingIsCounted) {
  Parameter unused;
  Router router(unused, alone, {.top_k = 2});
  const Tensor logits = draw({77, 8}, 1);
  const Unrecorded guard;
  const Routing a = router.route(logits, {.balance = {.aux = 0.5}}), b = router.route_written_out(logits, {});
  EXPECT_FALSE(router.statistics().count_E.defined());
  EXPECT_TRUE(a.expert_TK.equal(b.expert_TK));
  EXPECT_TRUE(a.count_E.equal(b.count_E));
  expect_near(a.weight_TK, b.weight_TK, 1e-6, 0, "weights");
}

// A step whose numbers are broken must look broken: sums of whole numbers know no NaN.
TEST(RoutingOnGpu, ANaNStaysVisible) {
  for (const BalanceScope scope : {BalanceScope::batch, BalanceScope::sequence}) {
    Setting s{.top_k = 2, .context = {.balance = {.aux = 0.5, .scope = scope, .sequences = 5, .sequence_T = sequences(200)[2].second}}};
    const Tensor logits = draw({200, 8}, 1);
    logits[117][3].fill_(NAN);
    const Outcome out = run(s, logits, draw({200, 2}, 9), true);
    EXPECT_TRUE(out.measures_3.isnan().all().item<bool>());
    EXPECT_TRUE(out.d_logits[117].isnan().any().item<bool>());
    EXPECT_EQ(out.count_E.sum().item<int64_t>(), 2 * 200 * 2);
  }
}

TEST(RoutingOnGpu, MoreExpertsThanTheKernelsTakeAreWrittenOut) {
  const Tensor logits = draw({33, 1025}, 1);
  EXPECT_FALSE(routes_in_one_pass(logits));
  Parameter unused;
  Router router(unused, alone, {.top_k = 8});
  EXPECT_TRUE(router.route(logits, {}).expert_TK.equal(choose_experts(logits, 8)));
}

TEST(RoutingOnGpu, NothingWaits) {
  Parameter weight = trained(draw({64, 256}, 1));
  Router router(weight, alone, {.top_k = 8});
  const Tensor x = draw({500, 256}, 2).to(at::kBFloat16).requires_grad_(), dw = draw({500, 8}, 3);
  std::vector<RouterContext> contexts;
  contexts.push_back({.balance = {.aux = 0.5, .z = 0.1}});
  contexts.push_back({.balance = {.aux = 0.5, .scope = BalanceScope::global}});
  contexts.push_back({.balance = {.aux = 0.5, .scope = BalanceScope::sequence, .sequences = 3, .sequence_T = sequences(500)[1].second}});
  run_backward(router.forward(x, contexts[0]).weight_TK, dw);   // cuBLAS makes its handle
  {
    const NoWaiting guard;
    for (const RouterContext& context : contexts) EXPECT_NO_THROW(run_backward(router.forward(x, context).weight_TK, dw));
  }
}

/// Products of one kind in fp64, in fp32 by cuBLAS, and ours.
struct Errors {
  double ours, fp32, unit;   ///< norms; unit: one in the last of fp32's 24 bits
};
Errors errors(const Tensor& ours, const Tensor& fp32, const Tensor& exact) {
  return {norm(ours.to(at::kDouble) - exact), norm(fp32.to(at::kDouble) - exact), norm(exact) * 0x1p-23};
}

struct Product {
  int64_t rows, width, outputs;
};
const std::vector<Product> kProducts = {{16384, 2048, 4}, {16384, 2048, 32}, {4096, 2048, 64}, {4096, 5120, 64}, {1000, 1024, 8}, {33, 64, 60},
                                        {1, 8, 2},        {257, 136, 128},   {129, 72, 1000},  {513, 4096, 16},  {2048, 1000, 17}};

/// Forward and backward of one product, held against fp64 and against cuBLAS in fp32.
void expect_as_accurate_as_fp32(const Product& p, const Tensor& x, const Tensor& w, const Tensor& dy) {
  SCOPED_TRACE(testing::Message() << p.rows << " rows, " << p.width << " -> " << p.outputs);
  ASSERT_FALSE(at::globalContext().allowTF32CuBLAS()) << "cuBLAS would not compute in fp32";
  Parameter weight = trained(w);
  const Tensor leaf = x.detach().requires_grad_(), y = router_product(leaf, weight);
  ASSERT_EQ(y.scalar_type(), at::kFloat);
  run_backward(y, dy);
  const Tensor x64 = x.to(at::kDouble), w64 = w.to(at::kDouble), dy64 = dy.to(at::kDouble), x32 = x.to(at::kFloat);

  const Errors forward = errors(y.detach(), at::mm(x32, w.t()), at::mm(x64, w64.t()));
  EXPECT_LE(forward.ours, std::max(2 * forward.fp32, forward.unit)) << "logits; fp32: " << forward.fp32 << ", unit " << forward.unit;
  const Errors gradient = errors(weight.main_grad, at::mm(dy.t(), x32), at::mm(dy64.t(), x64));
  EXPECT_LE(gradient.ours, std::max(2 * gradient.fp32, gradient.unit)) << "weight; fp32: " << gradient.fp32 << ", unit " << gradient.unit;
  ASSERT_EQ(leaf.grad().scalar_type(), at::kBFloat16);
  const Errors input = errors(leaf.grad(), at::mm(dy, w).to(at::kBFloat16), at::mm(dy64, w64));
  EXPECT_LE(input.ours, (p.rows < 33 ? 2 : 1.1) * input.fp32) << "rows; rounded once";
  std::printf("%6ld x %4ld -> %4ld: error / that of fp32: logits %.2f (%.2f units), weight %.2f (%.2f units), rows %.3f\n", static_cast<long>(p.rows),
              static_cast<long>(p.width), static_cast<long>(p.outputs), forward.ours / forward.fp32, forward.ours / forward.unit,
              gradient.ours / gradient.fp32, gradient.ours / gradient.unit, input.ours / input.fp32);

  // Added, not written; the same bits again.
  const Tensor once = weight.main_grad.clone(), second = x.detach().requires_grad_(), again = router_product(second, weight);
  EXPECT_TRUE(again.equal(y));
  run_backward(again, dy);
  EXPECT_TRUE(weight.main_grad.equal(once * 2));
  EXPECT_TRUE(second.grad().equal(leaf.grad()));
  EXPECT_EQ(weight.additions, 2);
}

TEST(RouterProductOnGpu, IsAsAccurateAsFp32) {
  for (const Product& p : kProducts) {
    expect_as_accurate_as_fp32(p, draw({p.rows, p.width}, 1).to(at::kBFloat16), draw({p.outputs, p.width}, 2) * 0.02, draw({p.rows, p.outputs}, 3));
  }
}

// Sums that only grow: whatever a unit cuts off goes one way.
TEST(RouterProductOnGpu, IsAsAccurateAsFp32WhereSumsGrow) {
  for (const Product& p : kProducts) {
    expect_as_accurate_as_fp32(p, (draw({p.rows, p.width}, 1).abs() + 0.5).to(at::kBFloat16), draw({p.outputs, p.width}, 2).abs() + 0.1,
                               draw({p.rows, p.outputs}, 3).abs() * 1e-6);
  }
}

// Rows that are nearly alike, and gradients that sum to zero: what is left is a thousandth of what was multiplied.
TEST(RouterProductOnGpu, IsAsAccurateAsFp32WhereRowsAreAlike) {
  for (const Product& p : kProducts) {
    if (p.outputs < 4 || p.outputs > 64) continue;
    const Tensor dy = draw({p.rows, p.outputs}, 3) * 1e-3;
    expect_as_accurate_as_fp32(p, draw({p.rows, p.width}, 1).to(at::kBFloat16), draw({1, p.width}, 2) + draw({p.outputs, p.width}, 4) * 1e-3,
                               dy - dy.mean(1, true));
  }
}

TEST(RouterProductOnGpu, RowsThatAreTiedGiveLogitsThatAreTied) {
  Parameter weight = trained(draw({16, 512}, 1).repeat_interleave(4, 0));
  const Tensor y = router_product(draw({300, 512}, 2).to(at::kBFloat16), weight).view({300, 16, 4});
  for (int64_t shard = 1; shard < 4; ++shard) EXPECT_TRUE(y.select(2, shard).equal(y.select(2, 0)));
}

TEST(RouterProductOnGpu, TakesNoRowsViewsAndLeadingDims) {
  Parameter weight = trained(draw({4, 64}, 1));
  const Tensor none = at::zeros({0, 64}, weight.value.options().dtype(at::kBFloat16)).requires_grad_(), y = router_product(none, weight);
  EXPECT_EQ(y.sizes(), (Shape{0, 4}));
  run_backward(y, at::zeros({0, 4}, weight.value.options()));
  EXPECT_EQ(norm(weight.main_grad), 0.0);
  const Tensor x = draw({6, 7, 64}, 2).to(at::kBFloat16), flat = router_product(x.view({42, 64}), weight);
  EXPECT_TRUE(router_product(x, weight).view({42, 4}).equal(flat));
  const Tensor shifted = draw({42 * 64 + 1}, 3).to(at::kBFloat16).narrow(0, 1, 42 * 64).view({42, 64});   // not at 16 bytes
  EXPECT_TRUE(router_product(shifted, weight).equal(router_product(shifted.clone(), weight)));
  EXPECT_TRUE(router_product(x.select(0, 1).t().contiguous().t(), weight).equal(router_product(x.select(0, 1), weight)));
}

TEST(RouterProductOnGpu, AddsIntoAViewOfAFlatBuffer) {
  const Tensor buffer = at::zeros({1 + 8 * 64 + 3}, at::TensorOptions(at::kFloat).device(kGpu));
  Parameter weight = trained(draw({8, 64}, 1)), other = trained(weight.value);
  weight.main_grad = buffer.narrow(0, 1, 8 * 64).view({8, 64});   // not at 16 bytes
  const Tensor x = draw({100, 64}, 2).to(at::kBFloat16), dy = draw({100, 8}, 3);
  run_backward(router_product(x, weight), dy);
  run_backward(router_product(x, other), dy);
  EXPECT_TRUE(weight.main_grad.equal(other.main_grad));
  EXPECT_EQ(buffer[0].item<float>(), 0.0F);
  EXPECT_EQ(norm(buffer.narrow(0, 1 + 8 * 64, 3)), 0.0);
}

// Widths that are not whole 16 bytes, and activations in fp32.
TEST(RouterProductOnGpu, AllElseIsLinear) {
  for (const auto& [width, dtype] : {std::pair{60, at::kBFloat16}, {64, at::kFloat}}) {
    Parameter weight = trained(draw({4, width}, 1)), same = trained(weight.value);
    const Tensor a = draw({33, width}, 2).to(dtype).requires_grad_(), b = a.detach().requires_grad_(), dy = draw({33, 4}, 3);
    const Tensor y = router_product(a, weight), z = linear(b, same);
    EXPECT_TRUE(y.equal(z));
    run_backward(y, dy);
    run_backward(z, dy);
    EXPECT_TRUE(a.grad().equal(b.grad()));
    EXPECT_TRUE(weight.main_grad.equal(same.main_grad));
  }
}

}  // namespace
}  // namespace upcycle
