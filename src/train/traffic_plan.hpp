#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "config/architecture.hpp"
#include "config/run_config.hpp"
#include "model/catalogue.hpp"

namespace upcycle {

/// Bytes that one rank sends to others along one axis in one training step, the most of any stage.
struct Traffic {
  Axis axis;
  const char* what;
  int64_t forward = 0;     ///< before and in forward
  int64_t backward = 0;    ///< in backward, what is computed anew included, and after it
  int64_t total() const { return forward + backward; }
};

/// All messages of a step but single numbers and counts, experts in balance, for algorithms that send no byte twice: an all-gather or a
/// reduce-scatter over n ranks sends (n - 1) / n of the whole, an all-reduce twice that. Kinds that do not occur are left out. Pure.
std::vector<Traffic> plan_traffic(const Architecture&, const RunConfig&, const Layout&);

/// The pipeline's idle time as a share of its computing time: (p - 1) / (v m) for p stages of v chunks and m micro-batches
/// (Narayanan et al., 2104.04473, section 2.2).
double pipeline_bubble(const RunConfig&, const Grid&);

/// Micro-batches that each data-parallel rank computes in a step.
int64_t micro_batches_of_rank(const RunConfig&, const Grid&);

}  // namespace upcycle
