#include "ops/uniform.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>

#include "base/autograd.hpp"

namespace upcycle {
namespace {

constexpr int64_t kWord = 0xffffffff;

struct Product {
  Tensor high, low;   // 32 bits each
};

// In halves of the factor, so that nothing leaves the 63 bits that an int64 has for numbers.
Product multiply(const Tensor& word, int64_t factor) {
  const Tensor lower = word * (factor & 0xffff), upper = word * (factor >> 16) + lower.bitwise_right_shift(16);
  return {upper.bitwise_right_shift(16), upper.bitwise_and(0xffff).mul(0x10000).add(lower.bitwise_and(0xffff))};
}

// philox4x32_10 of base/rng.cpp on tensors of words, each an int64.
std::array<Tensor, 4> philox(std::array<Tensor, 4> counter, int64_t key0, int64_t key1) {
  for (int round = 0; round < 10; ++round) {
    const Product product0 = multiply(counter[0], 0xD2511F53), product1 = multiply(counter[2], 0xCD9E8D57);
    counter = {product1.high.bitwise_xor(counter[1]).bitwise_xor(key0), product1.low,
               product0.high.bitwise_xor(counter[3]).bitwise_xor(key1), product0.low};
    key0 = (key0 + 0x9E3779B9) & kWord;
    key1 = (key1 + 0xBB67AE85) & kWord;
  }
  return counter;
}

int64_t low(uint64_t bits) { return static_cast<int64_t>(bits & kWord); }
int64_t high(uint64_t bits) { return static_cast<int64_t>(bits >> 32); }

}  // namespace

Tensor uniform(const Random& random, const Tensor& index_T, int64_t width) {
  const Unrecorded guard;
  const int64_t blocks = (width + 3) / 4;
  const Tensor block_TB = (index_T * blocks).unsqueeze(1) + at::arange(blocks, index_T.options());
  const auto constant = [&](int64_t word) { return at::full({}, word, index_T.options()); };
  const auto words = philox({block_TB.bitwise_and(kWord), block_TB.bitwise_right_shift(32), constant(low(random.stream())),
                             constant(high(random.stream()))},
                            low(random.seed()), high(random.seed()));
  const Tensor word_TB4 = at::stack({words[0], words[1], words[2], words[3]}, 2);
  return word_TB4.bitwise_right_shift(8).to(at::kFloat).mul_(0x1p-24).reshape({index_T.size(0), 4 * blocks}).narrow(1, 0, width);
}

}  // namespace upcycle
