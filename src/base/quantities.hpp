#pragma once
#include <cstdint>
#include <string>

namespace upcycle {

// Numbers for people.

/// "121.3 GB", with so many digits after the point. GB are 1e9 bytes.
std::string gigabytes(uint64_t bytes, int digits = 1);
inline std::string gigabytes(int64_t bytes, int digits = 1) { return gigabytes(static_cast<uint64_t>(bytes), digits); }

/// 89650000000 -> "89.65 G": four digits and a decimal prefix, for a unit to follow.
std::string with_prefix(double number);

/// Parameters as the field writes them: "89.65 B", "5.38 M".
std::string parameter_count(int64_t number);

}  // namespace upcycle
