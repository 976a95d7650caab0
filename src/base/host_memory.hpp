#pragma once
#include <cstdint>
#include <filesystem>

namespace upcycle {

/// Bytes of host memory that this process could still take without swapping: what the system says is available, or, where that is less,
/// what the limit of its control group (version 1 or 2, or one of the groups around it) leaves.
uint64_t available_host_memory();
/// The same as the /proc and /sys below `root` tell it.
uint64_t available_host_memory_below(const std::filesystem::path& root);

}  // namespace upcycle
