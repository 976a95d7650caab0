#pragma once

namespace upcycle::device {

/// Where Nsight Systems (nsys) has started this process: every TraceRange of it becomes an NVTX range, to the end of the process. Elsewhere, and
/// in a build without CUDA, nothing.
void show_ranges_to_nsight();

}  // namespace upcycle::device
