#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>

namespace upcycle {

/// printf's format, at most 255 characters.
template <class... Values>
std::string format(const char* pattern, Values... values) {
  char out[256];
  std::snprintf(out, sizeof out, pattern, values...);
  return out;
}

/// "2h05m", "3m07s", "4s".
inline std::string duration(double seconds) {
  const auto s = static_cast<long>(std::llround(seconds));
  if (s >= 3600) return format("%ldh%02ldm", s / 3600, s / 60 % 60);
  if (s >= 60) return format("%ldm%02lds", s / 60, s % 60);
  return format("%lds", s);
}

/// "737,280".
inline std::string with_commas(int64_t number) {
  std::string out = std::to_string(number);
  const size_t first = number < 0 ? 1 : 0;
  for (size_t at = out.size(); at > first + 3;) out.insert(at -= 3, ",");
  return out;
}

/// "0.6421 TFLOP/s", "171.5 TFLOP/s".
inline std::string tflops(double flops) { return format(flops >= 1e12 ? "%.1f TFLOP/s" : "%.4f TFLOP/s", flops / 1e12); }

}  // namespace upcycle
