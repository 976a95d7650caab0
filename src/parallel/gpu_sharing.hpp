#pragma once
#include <c10/core/Device.h>

#include <string>
#include <vector>

#include "parallel/communicator.hpp"

namespace upcycle {

/// **Collective.** One line for each GPU (a CUDA `device` each, told apart by `host` and UUID) that several ranks have taken: "ranks 0 and 2
/// of host n1 share one GPU (GPU-c6e3...)".
std::vector<std::string> shared_gpus(const Communicator& world, const std::string& host, c10::Device device);

/// The same of all ranks' "HOST UUID", in their order. Pure.
std::vector<std::string> shared_gpus(const std::vector<std::string>& places);

/// **Collective.** Throws UserError when ranks share a GPU, with those lines and what to do. CPUs are shared freely.
void refuse_shared_gpus(const Communicator& world, c10::Device device);
/// The same for such lines; none: nothing is shared. Pure.
void refuse_shared_gpus(const std::vector<std::string>& shared);

}  // namespace upcycle
