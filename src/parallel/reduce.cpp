#include "parallel/reduce.hpp"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <array>
#include <stdexcept>

#include "base/error.hpp"

namespace upcycle {
namespace {

// A NaN on any rank must reach all of them (the NaN policy depends on it); std::max alone would drop some.
template <class T>
T larger(T a, T b) {
  return a != a ? a : b != b ? b : std::max(a, b);
}
template <class T>
T smaller(T a, T b) {
  return a != a ? a : b != b ? b : std::min(a, b);
}

template <class T, class Accumulator, class Combine>
void fold(std::span<const std::byte* const> parts, std::byte* out, int64_t count, Combine combine) {
  constexpr int64_t kBlock = 2048;  // stays in the first-level cache
  std::array<Accumulator, kBlock> sum;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t size = std::min(kBlock, count - begin);
    const T* first = reinterpret_cast<const T*>(parts[0]) + begin;
    for (int64_t i = 0; i < size; ++i) sum[i] = static_cast<Accumulator>(first[i]);
    for (const std::byte* part : parts.subspan(1)) {
      const T* next = reinterpret_cast<const T*>(part) + begin;
      for (int64_t i = 0; i < size; ++i) sum[i] = combine(sum[i], static_cast<Accumulator>(next[i]));
    }
    T* result = reinterpret_cast<T*>(out) + begin;
    for (int64_t i = 0; i < size; ++i) result[i] = static_cast<T>(sum[i]);
  }
}

template <class T, class Accumulator = T>
void fold(std::span<const std::byte* const> parts, std::byte* out, int64_t count, Reduce how) {
  switch (how) {
    case Reduce::sum:
      return fold<T, Accumulator>(parts, out, count, [](auto a, auto b) { return a + b; });
    case Reduce::max:
      return fold<T, Accumulator>(parts, out, count, larger<Accumulator>);
    case Reduce::min:
      return fold<T, Accumulator>(parts, out, count, smaller<Accumulator>);
  }
}

}  // namespace

bool reducible(at::ScalarType dtype) noexcept {
  return dtype == at::kFloat || dtype == at::kDouble || dtype == at::kBFloat16 || dtype == at::kHalf ||
         dtype == at::kInt || dtype == at::kLong;
}

void reduce_in_order(std::span<const std::byte* const> parts, std::byte* out, int64_t count, at::ScalarType dtype,
                     Reduce how) {
  switch (dtype) {
    case at::kFloat:
      return fold<float>(parts, out, count, how);
    case at::kDouble:
      return fold<double>(parts, out, count, how);
    case at::kBFloat16:
      return fold<c10::BFloat16, float>(parts, out, count, how);
    case at::kHalf:
      return fold<c10::Half, float>(parts, out, count, how);
    case at::kInt:
      return fold<int32_t>(parts, out, count, how);
    case at::kLong:
      return fold<int64_t>(parts, out, count, how);
    default:
      throw std::logic_error(text("reduce: no arithmetic on ", c10::toString(dtype)));
  }
}

}  // namespace upcycle
