#include "parallel/reduce.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randn.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace upcycle {
namespace {

template <class T>
std::vector<T> reduced(const std::vector<std::vector<T>>& parts, at::ScalarType dtype, Reduce how) {
  std::vector<const std::byte*> raw;
  for (const auto& part : parts) raw.push_back(reinterpret_cast<const std::byte*>(part.data()));
  std::vector<T> out(parts[0].size());
  reduce_in_order(raw, reinterpret_cast<std::byte*>(out.data()), static_cast<int64_t>(out.size()), dtype, how);
  return out;
}

TEST(Reduce, SumsInTheOrderOfTheParts) {
  // (1e8 + 1) - 1e8 is 0 in fp32, (1e8 - 1e8) + 1 is 1.
  EXPECT_EQ(reduced<float>({{1e8f}, {1.f}, {-1e8f}}, at::kFloat, Reduce::sum)[0], 0.f);
  EXPECT_EQ(reduced<float>({{1e8f}, {-1e8f}, {1.f}}, at::kFloat, Reduce::sum)[0], 1.f);
}

TEST(Reduce, RoundsHalfPrecisionOnce) {
  // 256 + 1 is 256 in bf16, and again 256 after each further 1: rounding at each step would lose all of them.
  std::vector<std::vector<c10::BFloat16>> parts(9, {c10::BFloat16(1.f)});
  parts[0] = {c10::BFloat16(256.f)};
  EXPECT_EQ(static_cast<float>(reduced(parts, at::kBFloat16, Reduce::sum)[0]), 264.f);
  std::vector<std::vector<c10::Half>> halves(9, {c10::Half(1.f)});
  halves[0] = {c10::Half(2048.f)};
  EXPECT_EQ(static_cast<float>(reduced(halves, at::kHalf, Reduce::sum)[0]), 2056.f);
}

TEST(Reduce, LongTensorsCrossBlocks) {
  const Tensor a = at::randn({10007}), b = at::randn({10007}), c = at::randn({10007});
  Tensor out = a.clone();
  const auto raw = [](const Tensor& x) { return static_cast<const std::byte*>(x.data_ptr()); };
  const std::vector<const std::byte*> parts = {raw(out), raw(b), raw(c)};
  reduce_in_order(parts, static_cast<std::byte*>(out.data_ptr()), out.numel(), at::kFloat, Reduce::sum);  // in place
  EXPECT_TRUE(at::equal(out, (a + b) + c));
}

TEST(Reduce, MaxAndMinOfWholeNumbers) {
  const std::vector<std::vector<int64_t>> parts = {{1, -5, int64_t{1} << 60}, {2, -6, 0}};
  EXPECT_EQ(reduced(parts, at::kLong, Reduce::max), (std::vector<int64_t>{2, -5, int64_t{1} << 60}));
  EXPECT_EQ(reduced(parts, at::kLong, Reduce::min), (std::vector<int64_t>{1, -6, 0}));
  EXPECT_EQ(reduced<int32_t>({{7}, {8}}, at::kInt, Reduce::sum)[0], 15);
  EXPECT_EQ(reduced<double>({{0.5}, {0.25}}, at::kDouble, Reduce::sum)[0], 0.75);
}

TEST(Reduce, NotANumberReachesEveryone) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const Reduce how : {Reduce::sum, Reduce::max, Reduce::min}) {
    EXPECT_TRUE(std::isnan(reduced<float>({{nan}, {1.f}}, at::kFloat, how)[0]));
    EXPECT_TRUE(std::isnan(reduced<float>({{1.f}, {nan}}, at::kFloat, how)[0]));
  }
}

TEST(Reduce, RefusesOtherTypes) {
  EXPECT_FALSE(reducible(at::kBool));
  EXPECT_FALSE(reducible(at::kByte));
  EXPECT_THROW(reduced<uint8_t>({{1}}, at::kByte, Reduce::sum), std::logic_error);
}

}  // namespace
}  // namespace upcycle
