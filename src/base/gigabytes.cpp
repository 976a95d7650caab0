#include "base/gigabytes.hpp"

#include <cstdio>

namespace upcycle {

std::string gigabytes(uint64_t bytes, int digits) {
  char out[32];
  std::snprintf(out, sizeof out, "%.*f GB", digits, static_cast<double>(bytes) / 1e9);
  return out;
}

}  // namespace upcycle
