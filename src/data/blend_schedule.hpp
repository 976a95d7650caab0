#pragma once
#include <array>
#include <cstdint>
#include <mutex>
#include <vector>

#include "config/run_config.hpp"

namespace upcycle {

/// Which data set the i-th sample comes from, as a function of i. After any number n of samples, every data set was drawn
/// less than 1 away from weight * n times.
///
/// Weights are c of the M places of a cycle: the shortest cycle that has them to the rounding of float64 (0.7, 0.2, 0.1:
/// 10 places), or, where none of at most 2^20 places has them, one of about 2^61, longer than any run. The j-th sample of a
/// data set may come at floor(j*M/c) and must come before ceil((j+1)*M/c), which is what keeps every count at its weight;
/// the earliest deadline goes first. With full load on one "machine" that always succeeds (Baruah et al., "Proportionate
/// progress", Algorithmica 1996). Megatron's rule (the largest deficit first) can drift further.
///
/// The cycle is worked out in blocks, at the first question about one or one behind it; of every block only the counts at
/// its beginning are kept, and the last blocks asked for. Safe to use from several threads.
class BlendSchedule {
 public:
  /// Throws UserError naming the data set when a weight is not a positive number, or so small beside the sum that it is none
  /// (2^-62).
  explicit BlendSchedule(const std::vector<Blend>& blend);

  struct Pick {
    int64_t dataset;  ///< index into the blend
    int64_t sample;   ///< how many samples of that data set came before
    bool operator==(const Pick&) const = default;
  };
  /// Precondition: position >= 0.
  Pick at(int64_t position) const;
  /// How many of the first n samples are of `dataset`; and, without working the cycle out, at most how many.
  int64_t drawn(int64_t dataset, int64_t n) const;
  int64_t most(int64_t dataset, int64_t n) const;
  /// Where `sample` of `dataset` comes: at(position_of(d, s)) is {d, s}.
  int64_t position_of(int64_t dataset, int64_t sample) const;

  /// Places in the cycle, and those of `dataset`; its part of them.
  int64_t period() const noexcept { return period_; }
  int64_t places(int64_t dataset) const { return places_.at(dataset); }
  double share(int64_t dataset) const { return static_cast<double>(places(dataset)) / static_cast<double>(period_); }

 private:
  struct Place {
    int32_t dataset;
    int32_t sample;   ///< of the block's of that data set
    bool operator==(const Place&) const = default;
  };
  struct Block {
    int64_t number = -1;
    std::vector<Place> places;
  };
  const Block& block(int64_t number) const;   ///< needs the lock
  Block work_out(int64_t number) const;       ///< needs the counts before it; adds those behind it

  std::vector<int64_t> places_;
  int64_t period_;
  mutable std::mutex mutex_;
  mutable std::vector<std::vector<int64_t>> drawn_;   ///< [block, data set]: samples before it, as far as the cycle is worked out
  mutable std::array<Block, 2> recent_;               ///< the last first; two, for a step's batch may lie in both
};

}  // namespace upcycle
