#include "base/quantities.hpp"

#include <array>
#include <cstdio>

namespace upcycle {

std::string gigabytes(uint64_t bytes, int digits) {
  char out[32];
  std::snprintf(out, sizeof out, "%.*f GB", digits, static_cast<double>(bytes) / 1e9);
  return out;
}

std::string with_prefix(double number) {
  constexpr std::array<const char*, 8> kPrefixes = {"", "k", "M", "G", "T", "P", "E", "Z"};
  size_t power = 0;
  while (number >= 999.95 && power + 1 < kPrefixes.size()) number /= 1000, ++power;
  char out[32];
  const int decimals = power == 0 ? 0 : number < 9.9995 ? 3 : number < 99.995 ? 2 : 1;
  std::snprintf(out, sizeof out, "%.*f %s", decimals, number, kPrefixes[power]);
  return out;
}

std::string parameter_count(int64_t number) {
  char out[32];
  const bool small = number < 1000000000;
  std::snprintf(out, sizeof out, "%.2f %s", static_cast<double>(number) / (small ? 1e6 : 1e9), small ? "M" : "B");
  return out;
}

}  // namespace upcycle
