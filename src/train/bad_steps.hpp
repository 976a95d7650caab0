#pragma once
#include <string>

#include "config/run_config.hpp"
#include "train/trainer.hpp"

namespace upcycle {

/// The bad steps in a row, up to the newest that was read: those that changed nothing. The same on all ranks.
class BadSteps {
 public:
  explicit BadSteps(const TrainSection& train) : limit_(train.nan_policy == NanPolicy::stop ? 1 : train.nan_limit) {}

  /// Steps come in their order. A good one ends the row.
  void add(const StepReport&);

  bool any() const noexcept { return number_ > 0; }
  /// As many as train.nan_limit; one, where train.nan_policy says stop.
  bool too_many() const noexcept { return number_ >= limit_; }
  int64_t number() const noexcept { return number_; }
  int64_t first() const noexcept { return last_ - number_ + 1; }   ///< step
  int64_t last() const noexcept { return last_; }
  /// The first sample of the stream behind their data.
  int64_t position() const noexcept { return position_; }
  /// "the gradient was not finite for 3 steps in a row, last at step 4".
  std::string words() const;

 private:
  int64_t limit_;
  int64_t number_ = 0, spikes_ = 0, last_ = 0, position_ = 0;
};

}  // namespace upcycle
