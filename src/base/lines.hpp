#pragma once
#include <algorithm>
#include <limits>
#include <string>
#include <vector>

namespace upcycle {

/// For the end of a message: each line indented below it, at most so many and then "and 7 more". "" for none.
inline std::string listed(const std::vector<std::string>& lines, size_t most = std::numeric_limits<size_t>::max()) {
  std::string out;
  for (size_t i = 0; i < std::min(most, lines.size()); ++i) out += "\n  " + lines[i];
  if (lines.size() > most) out += "\n  and " + std::to_string(lines.size() - most) + " more";
  return out;
}

}  // namespace upcycle
