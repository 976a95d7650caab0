#pragma once
#include <c10/core/Device.h>

struct CUstream_st;   // CUDA's own name of what cudaStream_t points to

namespace upcycle::device {

/// The stream on which LibTorch works now, on this thread and GPU: where a kernel of ours must go to come in its turn. Throws
/// std::logic_error for a CPU.
CUstream_st* current_stream(c10::Device);

}  // namespace upcycle::device
