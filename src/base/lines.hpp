#pragma once
#include <algorithm>
#include <limits>
#include <string>
#include <vector>

namespace upcycle {

/// "a", "a and b", "a, b and c".
inline std::string in_a_row(const std::vector<std::string>& words) {
  std::string out;
  for (size_t i = 0; i < words.size(); ++i) out += (i == 0 ? "" : i + 1 == words.size() ? " and " : ", ") + words[i];
  return out;
}

/// For the end of a message: each line indented below it, at most so many and then "and 7 more". "" for none.
inline std::string listed(const std::vector<std::string>& lines, size_t most = std::numeric_limits<size_t>::max()) {
  std::string out;
  for (size_t i = 0; i < std::min(most, lines.size()); ++i) out += "\n  " + lines[i];
  if (lines.size() > most) out += "\n  and " + std::to_string(lines.size() - most) + " more";
  return out;
}

}  // namespace upcycle
