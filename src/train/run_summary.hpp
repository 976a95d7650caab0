#pragma once
#include <cstdint>
#include <filesystem>
#include <string>

#include "train/run_history.hpp"

namespace upcycle {

/// How fast a run could be.
struct Scale {
  double flops_per_token = 0.0;   ///< forward and backward
  double peak_flops = 0.0;        ///< of all devices together; 0: not known, nothing is said of it
};

/// Bytes of the rank that took most: on a GPU its tensors, on a CPU the whole process; and the tensors that were planned.
struct PeakMemory {
  int64_t peak = 0, planned = 0;
  int64_t device = 0;             ///< what a device has
};

/// What a run's history does not say of its end.
struct RunEnd {
  std::string name;
  int64_t step = 0, steps = 0;    ///< done, and asked for
  int64_t skipped = 0;
  double seconds = 0.0;           ///< wall clock of this start
  Scale scale;
  PeakMemory memory;
  int64_t experts = 0;            ///< 0: a dense model
  std::filesystem::path directory, checkpoint;
  bool tensorboard = false;
};

/// The run on one screen, over all its starts: how far, how fast, what came of it, and what to type next. A run that was asked to stop
/// (step < steps) gets the shorter half of it. Several lines, without a newline at the end.
std::string summarize(const RunHistory&, const RunEnd&);

}  // namespace upcycle
