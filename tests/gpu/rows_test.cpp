// The rows of the mixture on a GPU: their order, the copies and sums, swiglu with a weight for each row. Against the forms written out in
// ATen on the CPU, in fp64 where numbers are rounded; then what share of a copy's speed they reach.
#include <ATen/Context.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <cstdio>
#include <functional>

#include "ops/permute.hpp"
#include "ops/swiglu.hpp"
#include "support/gpu_time.hpp"
#include "support/no_waiting.hpp"
#include "support/numbers.hpp"
#include "support/tensors.hpp"

// Shapes: N choices, T tokens, K choices of each, E experts, R rows, D and F widths.
namespace upcycle {
namespace {

const at::Device kGpu(at::kCUDA, 0);

/// What is allocated next holds NaNs (and numbers that are no row's), so that what a kernel leaves out is seen.
void poison() {
  std::vector<Tensor> used;
  for (const int64_t bytes : {512, 4096, 65536, 1 << 20, 32 << 20}) {
    for (int i = 0; i < 8; ++i) used.push_back(at::full({bytes}, 255, at::TensorOptions(at::kByte).device(kGpu)));
  }
}

Tensor random_experts(const Shape& shape, int64_t experts, uint64_t seed) {
  return at::randint(experts, shape, at::detail::createCPUGenerator(seed), at::TensorOptions(at::kLong));
}

void expect_same_order(const RowOrder& ours, const RowOrder& theirs) {
  EXPECT_TRUE(ours.choice_R.is_cuda());
  EXPECT_TRUE(ours.choice_R.cpu().equal(theirs.choice_R));
  EXPECT_TRUE(ours.row_TK.cpu().equal(theirs.row_TK));
  EXPECT_TRUE(ours.end_E.cpu().equal(theirs.end_E));
  EXPECT_EQ(ours.end_E.scalar_type(), at::kInt);
}

/// All three orders and the counts of some choices, of which some may name expert `experts` or others that are not there.
void expect_same_orders(const Tensor& expert_TK, int64_t experts) {
  const Tensor there = expert_TK.to(kGpu);
  const auto within = [&](int64_t first, int64_t count) { return count_choices_written_out(expert_TK, count, first); };
  const int64_t all = within(0, experts).sum().item<int64_t>();
  poison();
  EXPECT_TRUE(count_choices(there, experts).cpu().equal(within(0, experts)));
  if (all == expert_TK.numel()) expect_same_order(sort_by_expert(there, experts), sort_by_expert_written_out(expert_TK, 0, experts, all));
  for (const auto& [first, count] : {std::pair<int64_t, int64_t>{0, experts}, {experts / 2, experts - experts / 2}, {experts / 3, 1}}) {
    SCOPED_TRACE(testing::Message() << "experts " << first << " .. " << first + count);
    const Tensor counts = within(first, count);
    const int64_t rows = counts.sum().item<int64_t>(), most = counts.max().item<int64_t>();
    EXPECT_TRUE(count_choices(there, count, first).cpu().equal(counts));
    expect_same_order(sort_by_expert(there, first, count, rows), sort_by_expert_written_out(expert_TK, first, count, rows));
    if (count * (most + 2) > 4'000'000) continue;
    for (const int64_t slots : {most, most + 2}) {
      poison();
      expect_same_order(slots_by_expert(there, first, count, slots), slots_by_expert_written_out(expert_TK, first, count, slots));
    }
  }
}

TEST(RowsOnGpu, OrdersAreThoseOfAStableSort) {
  for (const int64_t experts : {1, 4, 31, 32, 33, 64, 1000, 5000, 13000}) {   // the last: more than a block counts
    for (const int64_t choices : {0, 1, 31, 32, 33, 511, 512, 513, 4099}) {
      SCOPED_TRACE(testing::Message() << choices << " choices of " << experts << " experts");
      expect_same_orders(random_experts({choices, 1}, experts, 1), experts);
      expect_same_orders(random_experts({choices, 1}, experts + 2, 2), experts);             // some name nobody
      expect_same_orders(at::full({choices, 1}, experts - 1, at::kLong), experts);           // one takes all
      expect_same_orders(at::full({choices, 1}, experts, at::kLong), experts);               // none takes any
    }
  }
  expect_same_orders(random_experts({16384, 2}, 4, 3), 4);
  expect_same_orders(random_experts({16384, 8}, 64, 4), 64);
  expect_same_orders(random_experts({1024 * 512 + 333, 1}, 65, 5), 64);   // tiles of more than one stretch
  expect_same_orders(random_experts({1'500'001, 1}, 7, 6), 7);
}

struct Form {
  int64_t tokens, choices, width;
};
const std::vector<Form> kForms = {{1, 1, 1},   {1, 2, 8},    {0, 2, 16},   {17, 8, 3},    {33, 5, 4},     {300, 2, 64},
                                  {257, 9, 8}, {100, 4, 12}, {64, 3, 100}, {129, 2, 2048}, {1000, 8, 1030}, {77, 1, 1}};

/// y and the gradient that a given dy gives, in `dtype` and the same bits on both devices.
std::pair<Tensor, Tensor> there_and_back(const std::function<Tensor(const Tensor&)>& op, const Tensor& of, at::Device device) {
  const Tensor x = of.to(device).detach().requires_grad_();
  poison();
  const Tensor y = op(x);
  const Tensor dy = normal(y.sizes().vec(), 77).to(y.scalar_type()).to(device);
  poison();
  run_backward(y, dy);
  return {y.detach().cpu(), x.grad().cpu()};
}

/// Copies must be bit for bit; sums are rounded once, after additions in fp32 in the same order: the same bits, too.
void expect_same_bits(const char* what, const std::function<Tensor(const Tensor&, const RowOrder&)>& op, const Tensor& x, const RowOrder& order) {
  SCOPED_TRACE(what);
  RowOrder there = order;
  for (Tensor* t : {&there.choice_R, &there.row_TK, &there.end_E}) *t = t->to(kGpu);
  const auto [y, dx] = there_and_back([&](const Tensor& t) { return op(t, there); }, x, kGpu);
  const auto [y_cpu, dx_cpu] = there_and_back([&](const Tensor& t) { return op(t, order); }, x, at::kCPU);
  EXPECT_EQ(y.scalar_type(), y_cpu.scalar_type());
  EXPECT_EQ(dx.scalar_type(), x.scalar_type());
  EXPECT_TRUE(y.equal(y_cpu));
  EXPECT_TRUE(dx.equal(dx_cpu));
}

TEST(RowsOnGpu, CopiesAndSumsAreTheSameBits) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const auto& [tokens, choices, width] : kForms) {
      SCOPED_TRACE(testing::Message() << dtype << ": " << tokens << " tokens, top-" << choices << ", width " << width);
      const Tensor expert_TK = normal({tokens, 11}, 1).argsort(int64_t{-1}).narrow(1, 0, choices).contiguous();
      const int64_t within = count_choices(expert_TK, 5, 2).sum().item<int64_t>(), slots = std::max<int64_t>(1, tokens);
      for (const RowOrder& order : {sort_by_expert(expert_TK, 11), sort_by_expert(expert_TK, 2, 5, within), slots_by_expert(expert_TK, 2, 5, slots)}) {
        const int64_t rows = order.choice_R.size(0);
        const Tensor x_TD = normal({tokens, width}, 2, dtype), y_RD = normal({rows, width}, 3, dtype);
        expect_same_bits("spread", [](const Tensor& x, const RowOrder& o) { return spread_rows(x, o); }, x_TD, order);
        expect_same_bits("sum", [](const Tensor& x, const RowOrder& o) { return sum_rows(x, o); }, y_RD, order);
        expect_same_bits("sum in fp32", [](const Tensor& x, const RowOrder& o) { return sum_rows(x, o, at::kFloat); }, y_RD, order);
        const Tensor onto_TD = normal({tokens, width}, 6, dtype);
        expect_same_bits("onto", [&](const Tensor& y, const RowOrder& o) { return add_rows(onto_TD.to(y.device()), y, o); }, y_RD, order);
        expect_same_bits("through", [&](const Tensor& x, const RowOrder& o) { return add_rows(x, y_RD.to(x.device()), o); }, onto_TD, order);
        const Tensor weight_N1 = normal({tokens * choices, 1}, 4, dtype);
        expect_same_bits("weights", [](const Tensor& x, const RowOrder& o) { return spread_rows(x, by_choice(o)); }, weight_N1, order);
      }
      const RowOrder order = sort_by_expert(expert_TK, 11);
      expect_same_bits("permute", [](const Tensor& x, const RowOrder& o) { return permute_rows(x, o.choice_R); },
                       normal({tokens * choices, width}, 5, dtype), order);
    }
  }
}

// Rows that begin beside a multiple of 16 bytes.
TEST(RowsOnGpu, RowsMayBeginAnywhere) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const RowOrder order = sort_by_expert(random_experts({40, 2}, 5, 1), 5);
    const auto shifted = [](const Tensor& x) {
      const Tensor room = at::empty({x.numel() + 1}, x.options());
      return room.narrow(0, 1, x.numel()).view(x.sizes()).copy_(x);
    };
    const Tensor x = normal({40, 64}, 2, dtype), y = normal({80, 64}, 3, dtype);
    expect_same_bits("spread", [&](const Tensor& x, const RowOrder& o) { return spread_rows(shifted(x.detach()), o) + x.sum() * 0; }, x, order);
    expect_same_bits("sum", [&](const Tensor& y, const RowOrder& o) { return sum_rows(shifted(y.detach()), o) + y.sum() * 0; }, y, order);
    expect_same_bits("onto", [&](const Tensor& y, const RowOrder& o) { return add_rows(shifted(x.to(y.device())), y, o); }, y, order);
    const Tensor gate_up = normal({40, 64}, 4, dtype).to(kGpu);
    EXPECT_LE(distance(swiglu(shifted(gate_up)), swiglu(gate_up)), 1e-6);
  }
}

/// In fp64, differentiated by ATen.
Tensor formula(const Tensor& gate_up, const Tensor& weight_R1) {
  const int64_t width = gate_up.size(-1) / 2;
  const Tensor gate = gate_up.narrow(-1, 0, width), product = gate * at::sigmoid(gate) * gate_up.narrow(-1, width, width);
  return weight_R1.defined() ? product * weight_R1 : product;
}

TEST(RowsOnGpu, SwigluIsTheFormula) {
  for (const auto& [rows, width] : std::vector<std::pair<int64_t, int64_t>>{
           {1, 1}, {5, 3}, {0, 8}, {130, 8}, {33, 100}, {7, 255}, {129, 768}, {9, 1000}, {4, 2056}, {5, 2176}, {67, 6144}, {3, 9001}}) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      for (const bool weighed : {false, true}) {
        SCOPED_TRACE(testing::Message() << dtype << ": " << rows << " rows of " << width << (weighed ? ", weighed" : ""));
        const Tensor numbers = normal({rows, 2 * width}, 1, dtype) * 2, weights = normal({rows, 1}, 2), dy = normal({rows, width}, 3, dtype);
        const auto leaf = [](const Tensor& x) { return x.detach().clone().requires_grad_(); };
        const Tensor x = leaf(numbers.to(kGpu)), w = weighed ? leaf(weights.to(kGpu)) : Tensor();
        const Tensor x64 = leaf(numbers.to(at::kDouble)), w64 = weighed ? leaf(weights.to(at::kDouble)) : Tensor();
        poison();
        const Tensor y = weighed ? swiglu(x, w) : swiglu(x), y64 = formula(x64, w64);
        poison();
        run_backward(y, dy.to(kGpu));
        run_backward(y64, dy.to(at::kDouble));
        const double bound = dtype == at::kFloat ? 2e-6 : 0x1p-8;   // one rounding
        EXPECT_EQ(y.scalar_type(), dtype);
        EXPECT_LE(distance(y, y64), bound);
        EXPECT_LE(distance(x.grad(), x64.grad()), bound);
        // Never rounded to bf16; a sum of few terms may cancel.
        if (weighed) EXPECT_LE(distance(w.grad(), w64.grad()), width < 10 ? 1e-4 : 1e-5);
      }
    }
  }
}

TEST(RowsOnGpu, SwigluOfExtremeGates) {
  const Tensor gate = at::tensor({-1e30, -500.0, -100.0, -88.0, -20.0, -0.0, 0.0, 20.0, 88.0, 100.0, 500.0, 1e30}, at::kFloat);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    const Tensor gate_up = at::stack({gate, at::full({12}, 2.0)}, 1).to(dtype);   // rows of one number
    const Tensor x = gate_up.to(kGpu).requires_grad_(), x64 = gate_up.to(at::kDouble).requires_grad_();
    const Tensor y = swiglu(x), y64 = formula(x64, {});
    run_backward(y, at::full({12, 1}, 1.0, x.options()));
    run_backward(y64, at::full({12, 1}, 1.0, x64.options()));
    for (const auto& [ours, theirs] : {std::pair{y, y64}, {x.grad(), x64.grad()}}) {
      const Tensor a = ours.detach().cpu().to(at::kDouble), b = theirs.detach();
      EXPECT_TRUE((a - b).abs().le(b.abs() * 0x1p-7 + 1e-30).all().item<bool>()) << a << b;
    }
  }
}

TEST(RowsOnGpu, TwiceTheSameBits) {
  const RowOrder order = sort_by_expert(random_experts({5000, 8}, 64, 1).to(kGpu), 64), again = sort_by_expert(random_experts({5000, 8}, 64, 1).to(kGpu), 64);
  EXPECT_TRUE(order.choice_R.equal(again.choice_R));
  const Tensor gate_up = normal({40000, 1536}, 2, at::kBFloat16).to(kGpu), weight = normal({40000, 1}, 3).to(kGpu);
  std::vector<Tensor> first;
  for (int pass = 0; pass < 2; ++pass) {
    const Tensor x = gate_up.detach().clone().requires_grad_(), w = weight.detach().clone().requires_grad_();
    const Tensor y = sum_rows(swiglu(x, w), order);
    run_backward(y, normal({5000, 768}, 4, at::kBFloat16).to(kGpu));
    const std::vector<Tensor> now = {y.detach().cpu(), x.grad().cpu(), w.grad().cpu()};
    if (pass == 0) first = now;
    for (size_t i = 0; i < now.size(); ++i) EXPECT_TRUE(same_bits(now[i], first[i])) << i;
  }
}

TEST(RowsOnGpu, NothingMakesTheHostWait) {
  const Tensor expert_TK = random_experts({500, 2}, 8, 1).to(kGpu);
  const Tensor x = normal({500, 64}, 2, at::kBFloat16).to(kGpu).requires_grad_(), w = normal({500, 2}, 3).to(kGpu).requires_grad_();
  const Tensor dy = normal({500, 32}, 4, at::kBFloat16).to(kGpu);
  const auto pass = [&] {
    for (const RowOrder& order : {sort_by_expert(expert_TK, 8), slots_by_expert(expert_TK, 2, 4, 500)}) {
      const Tensor y = swiglu(spread_rows(x, order), spread_rows(w.reshape({-1, 1}), by_choice(order)));
      run_backward(sum_rows(y, order), dy);
    }
    count_choices(expert_TK, 8);
  };
  pass();
  {
    const NoWaiting guard;
    EXPECT_NO_THROW(pass());
  }
}

// Each kernel is bound by what it moves: against a copy of 1 GiB in the same run. The sort is bound by its three launches.
TEST(RowsOnGpu, SpeedIsNearACopys) {
  const Tensor from = at::full({int64_t{1} << 29}, 1.0, at::TensorOptions(at::kBFloat16).device(kGpu)), to = at::empty_like(from);
  const double copy = 2 * static_cast<double>(from.nbytes()) / milliseconds([&] { to.copy_(from); }) * 1e-6;
  std::printf("copy: %.0f GB/s\n", copy);
  const auto report = [&](const char* what, double bytes, double share, const std::function<void()>& call) {
    const double ms = milliseconds(call), rate = bytes / ms * 1e-6;
    std::printf("  %-24s %7.1f MB %8.1f us %6.0f GB/s, %3.0f %% of the copy\n", what, bytes * 1e-6, ms * 1e3, rate, 100 * rate / copy);
    EXPECT_GE(rate, share * copy) << what;
  };
  for (const auto& [experts, choices, width] : {std::tuple<int64_t, int64_t, int64_t>{4, 2, 6144}, {64, 8, 768}}) {
    const int64_t tokens = 16384, hidden = 2048, rows = tokens * choices;
    const double w = 2, h = static_cast<double>(hidden), f = static_cast<double>(width), r = static_cast<double>(rows), t = tokens;
    std::printf("%ld experts, top-%ld of width %ld, %ld tokens of width %ld\n", static_cast<long>(experts), static_cast<long>(choices),
                static_cast<long>(width), static_cast<long>(tokens), static_cast<long>(hidden));
    const Tensor expert_TK = normal({tokens, experts}, 1).argsort(int64_t{-1}).narrow(1, 0, choices).contiguous().to(kGpu);
    const RowOrder order = sort_by_expert(expert_TK, experts);
    const Tensor x_TD = normal({tokens, hidden}, 2, at::kBFloat16).to(kGpu), y_RD = spread_rows(x_TD, order);
    const Tensor permutation_R = order.choice_R, gate_up = normal({tokens, 2 * width}, 3, at::kBFloat16).to(kGpu).repeat({choices, 1});
    const Tensor weight_R1 = normal({rows, 1}, 4).to(kGpu), dy = swiglu(gate_up, weight_R1);
    report("spread", (t + r) * h * w + 8 * r, 0.6, [&] { spread_rows(x_TD, order); });
    report("sum", (t + r) * h * w + 8 * r, 0.6, [&] { sum_rows(y_RD, order); });
    report("permute", 2 * r * h * w + 8 * r, 0.6, [&] { permute_rows(y_RD, permutation_R); });
    report("swiglu", 3 * r * f * w, 0.6, [&] { swiglu(gate_up, weight_R1); });
    std::vector<Tensor> graphs;   // recorded before: backward alone is timed
    const Tensor x = gate_up.detach().requires_grad_(), leaf = weight_R1.detach().requires_grad_();
    for (int i = 0; i < 33; ++i) graphs.push_back(swiglu(x, leaf));
    report("swiglu backward", 5 * r * f * w, 0.6, [&] {
      torch::autograd::grad({graphs.back()}, {x, leaf}, {dy});
      graphs.pop_back();
    });
    const double sort = milliseconds([&] { sort_by_expert(expert_TK, experts); }), count = milliseconds([&] { count_choices(expert_TK, experts); });
    const double written_out = milliseconds([&] { sort_by_expert_written_out(expert_TK, 0, experts, rows); });
    std::printf("  sort %.1f us, counts %.1f us; by argsort %.1f us\n", sort * 1e3, count * 1e3, written_out * 1e3);
    EXPECT_LT(sort, written_out);
  }
}

}  // namespace
}  // namespace upcycle
