#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "config/run_config.hpp"
#include "data/sampler.hpp"

namespace upcycle {

/// What a whole run, from its first to its last step, takes from one data set of data.train.
struct Passes {
  std::string prefix;
  double drawn;      ///< samples, to one
  int64_t samples;   ///< of one pass; 0: mock data, which never repeats itself
  bool masked;       ///< learned where a loss mask says so
  double passes() const { return samples > 0 ? drawn / static_cast<double>(samples) : 0.0; }
};
std::vector<Passes> passes_of(const RunConfig&, const Sampler& train);

/// What is wrong with a run that passes a data set more often than data.epochs: names every such data set, its samples and its passes,
/// and the most steps that keep to the limit. Empty for a run that does, to the sample.
std::string too_many_passes(const RunConfig&, const Sampler& train);

}  // namespace upcycle
