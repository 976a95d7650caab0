#include "device/stream.hpp"

#ifdef UPCYCLE_CUDA
#include <c10/cuda/CUDAStream.h>
#endif

#include <stdexcept>

namespace upcycle::device {

CUstream_st* current_stream([[maybe_unused]] c10::Device device) {
#ifdef UPCYCLE_CUDA
  if (device.is_cuda()) return c10::cuda::getCurrentCUDAStream(device.index()).stream();
#endif
  throw std::logic_error("only a GPU has a stream");
}

}  // namespace upcycle::device
