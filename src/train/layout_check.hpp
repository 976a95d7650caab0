#pragma once
#include <optional>
#include <string>
#include <vector>

#include "config/architecture.hpp"
#include "config/run_config.hpp"
#include "parallel/grid.hpp"

namespace upcycle {

/// The smallest number of ranks that the degrees of [parallel] allow.
int64_t smallest_world(const ParallelSection&);

/// A run on `world` ranks: its grid, where the degrees allow one, and everything that does not divide, one line each with the
/// keys and numbers. Pure.
struct LayoutCheck {
  std::optional<Grid> grid;
  std::vector<std::string> problems;
};
LayoutCheck check_layout(const RunConfig&, const Architecture&, int world);

/// Throws UserError with all of these problems.
void refuse_what_does_not_divide(const RunConfig&, const Architecture&, int world);

/// "tensor 2, data 4, expert 8": the axes of more than one rank, or "one rank".
std::string describe(const Grid&);

}  // namespace upcycle
