#pragma once
#include <string>
#include <vector>

#include "config/run_config.hpp"

namespace upcycle {

/// A complaint about `key` in the light of other keys.
struct Problem {
  std::string key;
  std::string what;
};

/// Fields held against each other; what depends on the source model or the number of ranks is judged later.
std::vector<Problem> check_together(const RunConfig&);

}  // namespace upcycle
