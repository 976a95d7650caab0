#pragma once
#include <string>
#include <string_view>
#include <vector>

namespace upcycle {

/// Insertions, deletions, replacements and swaps of neighbours that turn `a` into `b`.
int edit_distance(std::string_view a, std::string_view b);

/// The candidate nearest to `word`, empty when none is near enough to have been meant.
std::string closest(std::string_view word, const std::vector<std::string>& candidates);

/// "; did you mean 'steps'?", or nothing.
std::string did_you_mean(std::string_view word, const std::vector<std::string>& candidates);

}  // namespace upcycle
