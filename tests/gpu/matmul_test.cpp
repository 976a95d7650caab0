// Grouped products by every kernel against one product an expert in fp32; weight gradients added in fp32, dense and grouped.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <functional>
#include <limits>
#include <numeric>

#include "device/device.hpp"
#include "ops/cuda/grouped_gemm.hpp"
#include "ops/grouped_matmul.hpp"
#include "ops/linear.hpp"
#include "support/gpu_time.hpp"
#include "support/no_waiting.hpp"
#include "support/numbers.hpp"

// Shapes: R rows sorted by expert, E experts, I inputs, O outputs.
namespace upcycle {
namespace {

const at::Device kGpu(at::kCUDA, 0);
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
using enum GroupedKernel;

Tensor bf16(const Shape& shape, uint64_t seed) { return normal(shape, seed).to(at::kBFloat16).to(kGpu); }

/// Rows with NaN behind the last: who reads on learns of it.
Tensor rows_before_nan(int64_t rows, int64_t width, uint64_t seed) {
  const Tensor all = at::full({rows + 130, width}, kNaN, at::TensorOptions(at::kBFloat16).device(kGpu));
  const Tensor mine = all.narrow(0, 0, rows);
  mine.copy_(bf16({rows, width}, seed));
  return mine;
}

struct Case {
  int64_t in, out;
  std::vector<int> rows_of_expert;
  int64_t experts() const { return static_cast<int64_t>(rows_of_expert.size()); }
  int64_t rows() const { return std::accumulate(rows_of_expert.begin(), rows_of_expert.end(), int64_t{0}); }
  Tensor end_E() const {
    Tensor end = at::empty({experts()}, at::kInt);
    std::partial_sum(rows_of_expert.begin(), rows_of_expert.end(), end.mutable_data_ptr<int32_t>());
    return end.to(kGpu);
  }
  std::string name() const {
    std::string name = std::to_string(in) + " -> " + std::to_string(out) + ", rows";
    for (const int rows : rows_of_expert) name += " " + std::to_string(rows);
    return name;
  }
};

std::vector<Case> cases() {
  std::vector<int> many, one_of_many(70, 0);
  for (int e = 0; e < 70; ++e) many.push_back(e % 9 == 4 ? 0 : (e * 37) % 150);
  one_of_many[41] = 333;
  std::vector<int> crowd;   // more than a block has threads
  for (int e = 0; e < 300; ++e) crowd.push_back(e % 7 == 3 ? 0 : e % 3);
  return {{64, 48, {16, 0, 37, 1}},    {40, 8, {0, 0, 0, 20}},      {8, 8, {1}},           {136, 264, {1, 0, 0, 0}},
          {520, 1032, {129, 513, 64}}, {256, 512, {0, 0, 700, 0}},  {2048, 1536, {3, 130, 0, 65, 1, 128}},
          {768, 512, {4099, 1, 4096}}, {96, 200, many},             {128, 128, one_of_many},
          {16, 24, crowd}};
}

bool runs_here(GroupedKernel kernel) { return kernel == aten || cuda::has_grouped_gemm(); }
std::string name_of(GroupedKernel kernel) {
  return kernel == automatic ? "automatic" : kernel == aten ? "ATen" : kernel == wide ? "wide" : "square";
}

TEST(GroupedProducts, OfRowsByEveryKernel) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(c.name());
    const Tensor x = rows_before_nan(c.rows(), c.in, 1), dy = rows_before_nan(c.rows(), c.out, 2), end = c.end_E();
    const Tensor weight = bf16({c.experts(), c.out, c.in}, 3), weight32 = weight.to(at::kFloat);
    const Tensor y32 = grouped_product(x.to(at::kFloat), weight32, end, one_by_one);
    const Tensor dx32 = grouped_input_gradient(dy.to(at::kFloat), weight32, end, one_by_one);
    for (const GroupedKernel kernel : {automatic, aten, wide}) {
      if (!runs_here(kernel)) continue;
      SCOPED_TRACE(name_of(kernel));
      // The allocator hands this memory on: what is not written stays NaN.
      at::full(y32.sizes(), kNaN, x.options());
      EXPECT_LE(distance(grouped_product(x, weight, end, kernel), y32), 0x1p-8);
      at::full(dx32.sizes(), kNaN, x.options());
      const Tensor dx = grouped_input_gradient(dy, weight, end, kernel);
      EXPECT_LE(distance(dx, dx32), 0x1p-8);
      if (kernel == wide) EXPECT_TRUE(grouped_input_gradient(dy, weight, end, kernel, /*beside_transfers=*/true).equal(dx)) << "not the same bits";
    }
  }
}

// Two micro-batches onto a gradient that is not zero. Ours are fp32 sums: one rounding of the products to bf16 would be off by 1.7e-3.
TEST(GroupedProducts, WeightGradientsAreAddedByEveryKernel) {
  for (const Case& c : cases()) {
    SCOPED_TRACE(c.name());
    const Tensor end = c.end_E();
    const Tensor before = normal({c.experts(), c.out, c.in}, 7).to(kGpu);
    const auto add_two = [&](Tensor main_grad, GroupedKernel kernel, at::ScalarType dtype) {
      for (uint64_t micro_batch = 0; micro_batch < 2; ++micro_batch) {
        const Tensor x = rows_before_nan(c.rows(), c.in, 10 + micro_batch), dy = rows_before_nan(c.rows(), c.out, 20 + micro_batch);
        add_grouped_weight_gradient(main_grad, dy.to(dtype), x.to(dtype), end, kernel);
      }
    };
    const Tensor expected = before.clone();
    add_two(expected, one_by_one, at::kFloat);
    for (const GroupedKernel kernel : {automatic, aten, wide, square}) {
      if (!runs_here(kernel)) continue;
      SCOPED_TRACE(name_of(kernel));
      const int64_t margin = 1024, numbers = before.numel();
      const Tensor memory = at::full({margin + numbers + margin}, 1234.5, before.options());
      const Tensor main_grad = memory.narrow(0, margin, numbers).view(before.sizes());
      main_grad.copy_(before);
      add_two(main_grad, kernel, at::kBFloat16);
      EXPECT_LE(distance(main_grad - before, expected - before), kernel == aten || !runs_here(wide) ? 0x1p-8 : 1e-4);
      EXPECT_TRUE(memory.narrow(0, 0, margin).eq(1234.5).all().item<bool>()) << "it wrote in front of the gradient";
      EXPECT_TRUE(memory.narrow(0, margin + numbers, margin).eq(1234.5).all().item<bool>()) << "it wrote behind the gradient";
      for (int64_t e = 0; e < c.experts(); ++e) {
        if (c.rows_of_expert[e] == 0) EXPECT_TRUE(main_grad[e].equal(before[e])) << "expert " << e << " has no rows";
      }
      const Tensor again = before.clone();
      add_two(again, kernel, at::kBFloat16);
      EXPECT_TRUE(again.equal(main_grad)) << "not the same bits";

      // Overwriting what is no number is adding to nothing, also where an expert has no rows, and only inside.
      const Tensor x = rows_before_nan(c.rows(), c.in, 10).to(at::kBFloat16), dy = rows_before_nan(c.rows(), c.out, 20).to(at::kBFloat16);
      const Tensor sum = at::zeros_like(before);
      EXPECT_FALSE(add_grouped_weight_gradient(sum, dy, x, end, kernel).defined()) << "the product does not know what was there";
      main_grad.fill_(kNaN);
      Tensor squares = add_grouped_weight_gradient(main_grad, dy, x, end, kernel, /*overwrite=*/true);
      EXPECT_TRUE(main_grad.equal(sum)) << "overwritten";
      EXPECT_EQ(squares.defined(), kernel != aten && runs_here(wide));
      if (squares.defined()) {
        const double of_all = main_grad.to(at::kDouble).square().sum().item<double>();
        EXPECT_NEAR(squares.sum().item<double>(), of_all, 1e-6 * of_all);
        const Tensor first = squares.clone();
        squares.fill_(kNaN);
        squares = Tensor();   // the allocator hands this memory on
        EXPECT_TRUE(add_grouped_weight_gradient(main_grad, dy, x, end, kernel, /*overwrite=*/true).equal(first)) << "not the same bits";
        main_grad.fill_(kNaN);
        EXPECT_TRUE(add_grouped_weight_gradient(main_grad, dy, x, end, kernel, /*overwrite=*/true, /*beside_transfers=*/true).equal(first));
        EXPECT_TRUE(main_grad.equal(sum)) << "in many small shares";
        add_grouped_weight_gradient(main_grad, dy, x, end, kernel, /*overwrite=*/false, /*beside_transfers=*/true);
        add_grouped_weight_gradient(sum, dy, x, end, kernel);
        EXPECT_TRUE(main_grad.equal(sum)) << "added in many small shares";
      }
      EXPECT_TRUE(memory.narrow(0, 0, margin).eq(1234.5).all().item<bool>()) << "it wrote in front of the gradient";
      EXPECT_TRUE(memory.narrow(0, margin + numbers, margin).eq(1234.5).all().item<bool>()) << "it wrote behind the gradient";
    }
  }
}

// Forward and backward of the op, every kernel; and that it makes the host wait for nothing.
TEST(GroupedProducts, WithBackwardAndWithoutWaiting) {
  const Case c{256, 384, {70, 0, 1, 300, 129}};
  const Tensor end = c.end_E(), dy = bf16({c.rows(), c.out}, 4);
  Parameter plain = trained(normal({c.experts(), c.out, c.in}, 3).to(at::kBFloat16).to(at::kFloat).to(kGpu));
  const Tensor x32 = bf16({c.rows(), c.in}, 2).to(at::kFloat).requires_grad_();
  const Tensor y32 = grouped_matmul(x32, plain, end);
  run_backward(y32, dy.to(at::kFloat));
  for (const GroupedKernel kernel : {automatic, aten, wide}) {
    if (!runs_here(kernel)) continue;
    SCOPED_TRACE(name_of(kernel));
    Parameter weight = trained(plain.value.to(at::kBFloat16));
    const Tensor x = x32.detach().to(at::kBFloat16).requires_grad_();
    device::synchronize(kGpu);
    Tensor y;
    {
      const NoWaiting guard;
      EXPECT_NO_THROW(y = grouped_matmul(x, weight, end, {kernel, kernel, kernel}); run_backward(y, dy));
    }
    EXPECT_LE(distance(y, y32), 0x1p-8);
    EXPECT_LE(distance(x.grad(), x32.grad()), 0x1p-8);
    EXPECT_LE(distance(weight.main_grad, plain.main_grad), kernel == aten || !runs_here(wide) ? 0x1p-8 : 1e-4);
    EXPECT_EQ(weight.additions, 1);
    EXPECT_FALSE(weight.squares.defined()) << "it was added to";
    weight.outdated = true;
    run_backward(grouped_matmul(x.detach().requires_grad_(), weight, end, {kernel, kernel, kernel}), dy);
    EXPECT_EQ(weight.squares.defined(), kernel != aten && runs_here(wide));
    weight.sums();
    EXPECT_FALSE(weight.squares.defined()) << "it may be added to";
  }
}

TEST(GroupedProducts, WhatAKernelDoesNotTake) {
  const Case c{64, 48, {5, 0, 9}}, odd{60, 33, {5, 0, 9}};
  const Tensor end = c.end_E(), x = bf16({14, 64}, 1), dy = bf16({14, 48}, 2);
  // A gradient whose address is no multiple of 16 bytes: another kernel takes over.
  const Tensor expected = at::zeros({3, 48, 64}, x.options().dtype(at::kFloat)), memory = at::zeros({3 * 48 * 64 + 1}, expected.options());
  const Tensor main_grad = memory.narrow(0, 1, 3 * 48 * 64).view({3, 48, 64});
  add_grouped_weight_gradient(expected, dy, x, end, one_by_one);
  add_grouped_weight_gradient(main_grad, dy, x, end);
  EXPECT_LE(distance(main_grad, expected), 0x1p-8);
  EXPECT_THROW(add_grouped_weight_gradient(main_grad, dy, x, end, wide), std::logic_error);
  // Widths of no whole vectors: one by one, as asked or not.
  const Tensor weight = bf16({3, 33, 60}, 3), rows = bf16({14, 60}, 4);
  EXPECT_TRUE(grouped_product(rows, weight, end).equal(grouped_product(rows, weight, end, one_by_one)));
  for (const GroupedKernel kernel : {aten, wide}) EXPECT_THROW(grouped_product(rows, weight, end, kernel), std::logic_error);
  EXPECT_THROW(grouped_product(rows.to(at::kFloat), weight.to(at::kFloat), end, wide), std::logic_error);
  // No rows at all.
  const Tensor none = at::zeros({3}, end.options()), untouched = expected.clone();
  add_grouped_weight_gradient(untouched, dy.narrow(0, 0, 0), x.narrow(0, 0, 0), none);
  EXPECT_TRUE(untouched.equal(expected));
}

// In bf16 the products are summed in fp32 onto what is there, whatever the strides.
TEST(LinearWeightGradient, IsAddedInFp32) {
  for (const auto& [rows, in, out] : {std::tuple{1, 64, 48}, {7, 13, 5}, {257, 136, 264}, {4096, 512, 768}, {0, 16, 16}, {33, 1, 1}}) {
    for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat}) {
      SCOPED_TRACE(testing::Message() << rows << " rows, " << in << " -> " << out << (dtype == at::kFloat ? ", fp32" : ", bf16"));
      const Tensor before = normal({2, out, in}, 1).to(kGpu), x = bf16({rows, in}, 2).to(dtype), dy = bf16({rows, out}, 3).to(dtype);
      const Tensor across = bf16({out, rows}, 4).to(dtype).t(), same = bf16({1, out}, 5).to(dtype).expand({rows, out});
      const Tensor main_grad = before.clone();
      Tensor expected = before[1].to(at::kDouble);
      for (const Tensor& d : {dy, across, same}) {
        add_weight_gradient(main_grad[1], d, x);
        expected = expected + at::mm(d.to(at::kDouble).t(), x.to(at::kDouble));
      }
      EXPECT_TRUE(main_grad[0].equal(before[0]));
      EXPECT_LE(distance(main_grad[1] - before[1], expected - before[1].to(at::kDouble)), dtype == at::kFloat ? 1e-5 : 1e-4);
      for (const Tensor& d : {dy, across, same}) {
        const Tensor overwritten = at::full(before.sizes(), kNaN, before.options());
        add_weight_gradient(overwritten[1], d, x, /*overwrite=*/true);
        EXPECT_TRUE(overwritten[0].isnan().all().item<bool>());
        EXPECT_LE(distance(overwritten[1], at::mm(d.to(at::kDouble).t(), x.to(at::kDouble))), dtype == at::kFloat ? 1e-5 : 1e-4);
      }
    }
  }
}

// No test: a table of milliseconds and TFLOP/s. --gtest_also_run_disabled_tests --gtest_filter='*Times*'
TEST(GroupedProducts, DISABLED_Times) {
  struct Layer {
    int64_t experts, rows, in, out;
  };
  std::printf("%-34s %-16s %12s %12s %12s %12s\n", "experts, rows, in -> out", "product", "one by one", "ATen", "wide", "square");
  for (const Layer& l : {Layer{4, 32768, 2048, 12288}, {4, 32768, 6144, 2048}, {64, 131072, 2048, 1536}, {64, 131072, 768, 2048},
                         {32, 131072, 2048, 1536}, {32, 131072, 768, 2048}}) {
    std::vector<int> rows(l.experts);
    for (int64_t e = 0, left = l.rows; e < l.experts; ++e) {   // up to a fifth more or less than the mean
      rows[e] = static_cast<int>(e + 1 == l.experts ? left : l.rows / l.experts * (100 + (e * 37 + 11) % 41 - 20) / 100);
      left -= rows[e];
    }
    const Case c{l.in, l.out, rows};
    const Tensor end = c.end_E(), x = bf16({l.rows, l.in}, 1), dy = bf16({l.rows, l.out}, 2), weight = bf16({l.experts, l.out, l.in}, 3);
    const Tensor main_grad = at::zeros(weight.sizes(), weight.options().dtype(at::kFloat));
    const auto row = [&](const char* product, const std::function<void(GroupedKernel)>& call) {
      std::printf("%3ld, %6ld, %5ld -> %5ld %8s %-16s", l.experts, l.rows, l.in, l.out, "", product);
      for (const GroupedKernel kernel : {one_by_one, aten, wide, square}) {
        if (kernel == square && product[0] != 'w' && product[0] != 'a') continue;
        const double ms = milliseconds([&] { call(kernel); });
        std::printf("  %5.2f (%3.0f)", ms, 2e-9 * l.rows * l.in * l.out / ms);
      }
      std::printf("\n");
    };
    row("forward", [&](GroupedKernel kernel) { grouped_product(x, weight, end, kernel); });
    row("input gradient", [&](GroupedKernel kernel) { grouped_input_gradient(dy, weight, end, kernel); });
    row("added gradient", [&](GroupedKernel kernel) { add_grouped_weight_gradient(main_grad, dy, x, end, kernel); });
    row("weight gradient", [&](GroupedKernel kernel) { add_grouped_weight_gradient(main_grad, dy, x, end, kernel, /*overwrite=*/true); });
  }
}

}  // namespace
}  // namespace upcycle
