#include "base/rng.hpp"

#include <cmath>
#include <numbers>

namespace upcycle {
namespace {

uint64_t join(uint32_t low, uint32_t high) noexcept { return uint64_t{high} << 32 | low; }
uint32_t low(uint64_t value) noexcept { return static_cast<uint32_t>(value); }
uint32_t high(uint64_t value) noexcept { return static_cast<uint32_t>(value >> 32); }

// The upper 53 bits: every value is a multiple of 2^-53 and below 1.
double unit(uint64_t bits) noexcept { return static_cast<double>(bits >> 11) * 0x1p-53; }

// FNV-1a, then SplitMix64's finaliser, because FNV leaves the last characters ("layers.1", "layers.2") in few bits.
uint64_t hash(std::string_view text) noexcept {
  uint64_t h = 0xcbf29ce484222325u;
  for (const char c : text) h = (h ^ static_cast<unsigned char>(c)) * 0x100000001b3u;
  h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9u;
  h = (h ^ (h >> 27)) * 0x94d049bb133111ebu;
  return h ^ (h >> 31);
}

}  // namespace

std::array<uint32_t, 4> philox4x32_10(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) noexcept {
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * counter[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter[2];
    counter = {high(product1) ^ counter[1] ^ key[0], low(product1), high(product0) ^ counter[3] ^ key[1],
               low(product0)};
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter;
}

Random::Random(uint64_t seed, std::string_view stream) : key_(seed), stream_(hash(stream)) {}

std::array<uint32_t, 4> Random::block(uint64_t index) const noexcept {
  return philox4x32_10({low(index), high(index), low(stream_), high(stream_)}, {low(key_), high(key_)});
}

uint64_t Random::bits(uint64_t index) const noexcept {
  const auto words = block(index);
  return join(words[0], words[1]);
}

double Random::uniform(uint64_t index) const noexcept { return unit(bits(index)); }

double Random::normal(uint64_t index) const noexcept {
  const auto words = block(index);
  const double radius = unit(join(words[0], words[1])) + 0x1p-53;  // in (0, 1]: the logarithm stays finite
  const double angle = unit(join(words[2], words[3]));
  return std::sqrt(-2.0 * std::log(radius)) * std::cos(2.0 * std::numbers::pi * angle);
}

uint64_t Random::below(uint64_t bound, uint64_t index) const noexcept {
  return static_cast<uint64_t>((static_cast<unsigned __int128>(bits(index)) * bound) >> 64);
}

}  // namespace upcycle
