#pragma once
#include <array>
#include <cstdint>
#include <string_view>

namespace upcycle {

/// The block function of Philox4x32-10: 128 random bits of (counter, key).
std::array<uint32_t, 4> philox4x32_10(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) noexcept;

/// Counter-based random numbers (Philox4x32-10, Salmon et al., SC'11): a pure function of (seed, stream name, index).
/// The same element gets the same number on any rank and in any order; nothing is stored, nothing advances.
class Random {
 public:
  /// `stream` names what is drawn, e.g. a tensor's name with a purpose: "model.layers.0.mlp.gate.weight/router".
  Random(uint64_t seed, std::string_view stream);

  /// 64 random bits of element `index`.
  uint64_t bits(uint64_t index) const noexcept;
  /// Uniform in [0, 1), 53 bits.
  double uniform(uint64_t index) const noexcept;
  /// Standard normal (Box-Muller on one Philox block per element).
  double normal(uint64_t index) const noexcept;
  /// Uniform integer in [0, bound), bound > 0, without bias worth naming (64-bit multiply-shift).
  uint64_t below(uint64_t bound, uint64_t index) const noexcept;

  /// Key and upper half of the counter, for those who draw whole tensors (ops/uniform.hpp).
  uint64_t seed() const noexcept { return key_; }
  uint64_t stream() const noexcept { return stream_; }

 private:
  std::array<uint32_t, 4> block(uint64_t index) const noexcept;

  uint64_t key_;
  uint64_t stream_;
};

}  // namespace upcycle
