#pragma once
#include <array>
#include <cstdint>

#include "base/rng.hpp"

namespace upcycle {

/// A pseudo-random order of 0 .. size-1 as a function: nothing is stored, so 10^9 samples cost what 10 do. A Feistel
/// network over pairs (left, right) with left < a, right < b and a*b just above size; values that leave the range go
/// round again (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002).
class Permutation {
 public:
  /// `which` picks one of the many orders that `keys` stands for, e.g. the epoch. Throws std::invalid_argument unless
  /// size > 0.
  Permutation(int64_t size, const Random& keys, int64_t which);

  /// Where `index` goes; a bijection of 0 .. size-1. Precondition: 0 <= index < size.
  int64_t operator()(int64_t index) const noexcept;

 private:
  static constexpr int kRounds = 8;
  uint64_t size_, a_, b_;
  std::array<uint64_t, 2 * kRounds> keys_;
};

}  // namespace upcycle
