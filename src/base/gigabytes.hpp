#pragma once
#include <cstdint>
#include <string>

namespace upcycle {

/// "121.3 GB", with so many digits after the point: sizes for people. GB are 1e9 bytes.
std::string gigabytes(uint64_t bytes, int digits = 1);
inline std::string gigabytes(int64_t bytes, int digits = 1) { return gigabytes(static_cast<uint64_t>(bytes), digits); }

}  // namespace upcycle
