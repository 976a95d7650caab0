#pragma once
#include <cstdint>
#include <string>

namespace upcycle {

/// The numbers next below and next above `near` in [1, most] that `fits` takes, for a message: "2 or 4", or one of them, or empty.
template <class Fits>
std::string nearest(int64_t near, int64_t most, const Fits& fits) {
  std::string out;
  for (int64_t below = near < most ? near - 1 : most; below >= 1; --below) {
    if (!fits(below)) continue;
    out = std::to_string(below);
    break;
  }
  for (int64_t above = near + 1; above <= most; ++above) {
    if (fits(above)) return out + (out.empty() ? "" : " or ") + std::to_string(above);
  }
  return out;
}

/// Those that divide `number`.
inline std::string nearest_divisors(int64_t near, int64_t number) {
  return nearest(near, number, [number](int64_t d) { return number % d == 0; });
}

/// The multiples of `step` next to `near`: "4 or 6".
inline std::string nearest_multiples(int64_t near, int64_t step) {
  const int64_t below = near / step * step;
  return (below > 0 ? std::to_string(below) + " or " : std::string()) + std::to_string(below + step);
}

}  // namespace upcycle
