#include "train/bad_steps.hpp"

#include "base/error.hpp"

namespace upcycle {

void BadSteps::add(const StepReport& report) {
  if (!report.skipped) {
    number_ = spikes_ = 0;
    return;
  }
  ++number_;
  spikes_ += report.spike;
  last_ = report.step;
  position_ = report.position;
}

std::string BadSteps::words() const {
  const std::string row = text(" for ", number_, " steps in a row");
  const std::string what = spikes_ == 0         ? "the gradient was not finite" + row
                           : spikes_ == number_ ? "the loss was a spike (train.spike)" + row
                                                : text("a loss spike or a gradient that was not finite", row, " (", spikes_, " spikes)");
  return text(what, ", last at step ", last_);
}

}  // namespace upcycle
