#include "ops/uniform.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include "base/tensor.hpp"

namespace upcycle {
namespace {

// Number by number: word w % 4 of block index * ceil(width / 4) + w / 4.
TEST(Uniform, IsPhiloxWordByWord) {
  const std::vector<int64_t> index = {0, 1, 7, 123456789012345};
  for (const uint64_t seed : {uint64_t{0}, uint64_t{1234}, ~uint64_t{0}}) {
    const Random random(seed, "model.layers.3.mlp.gate/jitter");
    for (const int64_t width : {1, 4, 10}) {
      const Tensor u = uniform(random, at::tensor(index), width);
      ASSERT_EQ(u.scalar_type(), at::kFloat);
      ASSERT_EQ(u.sizes(), (at::IntArrayRef{4, width}));
      for (size_t t = 0; t < index.size(); ++t) {
        for (int64_t w = 0; w < width; ++w) {
          const uint64_t block = static_cast<uint64_t>(index[t] * ((width + 3) / 4) + w / 4);
          const auto words = philox4x32_10({static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                                            static_cast<uint32_t>(random.stream()), static_cast<uint32_t>(random.stream() >> 32)},
                                           {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
          EXPECT_EQ(u[static_cast<int64_t>(t)][w].item<float>(), static_cast<float>(words[w % 4] >> 8) * 0x1p-24F);
        }
      }
    }
  }
}

TEST(Uniform, HasUniformsMeanAndVarianceAndStaysBelowOne) {
  const Tensor u = uniform(Random(5, "x"), at::arange(2000, at::kLong), 64);
  EXPECT_NEAR(u.mean().item<double>(), 0.5, 0.005);
  EXPECT_NEAR(u.to(at::kDouble).var().item<double>(), 1.0 / 12, 0.002);
  EXPECT_GE(u.min().item<float>(), 0.0F);
  EXPECT_LT(u.max().item<float>(), 1.0F);
  EXPECT_FALSE(u.equal(uniform(Random(5, "y"), at::arange(2000, at::kLong), 64)));
}

TEST(Uniform, TakesNoRows) { EXPECT_EQ(uniform(Random(5, "x"), at::arange(0, at::kLong), 6).sizes(), (at::IntArrayRef{0, 6})); }

}  // namespace
}  // namespace upcycle
