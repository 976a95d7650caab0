#pragma once
#include <string>
#include <vector>

namespace upcycle {

/// The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them; by number where that is not set; empty where there are none.
std::vector<std::string> visible_gpus();

/// The GPUs of slot number `slot` of `slots` jobs that run at a time, as a value for CUDA_VISIBLE_DEVICES: an equal share, in order. With
/// fewer GPUs than slots the slots take them in turn. Empty where there is nothing to share out (one slot, or fewer than two GPUs).
std::string gpus_of_slot(const std::vector<std::string>& gpus, size_t slots, size_t slot);

}  // namespace upcycle
