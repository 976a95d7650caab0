#pragma once
#include <cstdint>
#include <vector>

#include "config/run_config.hpp"

namespace upcycle {

/// Which data set the i-th sample comes from: a fixed cycle, so that the answer needs no history. Within it, and
/// therefore after any number n of samples, every data set was drawn less than 1 away from weight * n times.
///
/// The j-th sample of a data set with c of the cycle's M places may come at floor(j*M/c) and must come before
/// ceil((j+1)*M/c); the earliest deadline goes first. With full load on one "machine" that always succeeds (Baruah et
/// al., "Proportionate progress", Algorithmica 1996). Megatron's rule (the largest deficit first) needs the history and
/// can drift further.
///
/// The cycle is the shortest one that has the weights to 1e-9 (0.7, 0.2, 0.1: 10 places); weights that no cycle of at
/// most 2^20 places has are rounded to multiples of 2^-20.
class BlendSchedule {
 public:
  /// Throws UserError naming the data set when a weight is not a positive number, or is less than 2^-20 of the sum.
  explicit BlendSchedule(const std::vector<Blend>& blend);

  struct Pick {
    int64_t dataset;  ///< index into the blend
    int64_t sample;   ///< how many samples of that data set came before
    bool operator==(const Pick&) const = default;
  };
  /// Precondition: position >= 0.
  Pick at(int64_t position) const noexcept;

  /// Places in the cycle, and those of `dataset`.
  int64_t period() const noexcept { return static_cast<int64_t>(cycle_.size()); }
  int64_t places(int64_t dataset) const { return places_.at(dataset); }

 private:
  struct Place {
    int32_t dataset;
    int32_t sample;
  };
  std::vector<int64_t> places_;
  std::vector<Place> cycle_;
};

}  // namespace upcycle
