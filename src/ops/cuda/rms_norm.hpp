// The kernels of ops/rms_norm.hpp. Rows lie one after another and begin at multiples of 16 bytes; activations and the weight are bf16 or
// fp32 alike. Bytes moved: forward 2 rows a row, with a branch 4; backward 3, with the stream's gradient 4.
#pragma once
#include <algorithm>
#include <cstdint>

struct CUstream_st;

namespace upcycle::cuda {

struct RmsNorm {
  const void* x;        ///< [rows, width]
  const void* branch;   ///< [rows, width], added to x first; null: none
  const void* weight;   ///< [width]
  void* sum;            ///< [rows, width], x + branch as rounded; not written without a branch
  void* y;              ///< [rows, width]
  float* scale;         ///< [rows], 1 / root mean square
  int64_t rows;
  int width;
  float eps;
  bool bf16;
};

struct RmsNormBackward {
  const void* x;         ///< [rows, width], what was normed
  const float* scale;    ///< [rows]
  const void* weight;    ///< [width]
  const void* dy;        ///< [rows, width]
  const void* stream;    ///< [rows, width], the gradient that x gets elsewhere, added; null: none
  void* dx;              ///< [rows, width]
  float* partial;        ///< [rms_norm_partials(...), width], room for the weight gradient's first stage
  float* weight_sum;     ///< [width], to which the weight gradient is added
  int64_t rows;
  int width;
  bool bf16;
};

/// Numbers in 16 bytes.
constexpr int lanes_of(bool bf16) { return bf16 ? 8 : 4; }

/// Backward holds a row in one block: so many vectors of 16 bytes a thread, and so many threads.
constexpr int rms_norm_vectors(int64_t width, bool bf16) {
  const int64_t vectors = width / lanes_of(bf16);
  return vectors <= 512 ? 1 : vectors <= 1024 ? 2 : 4;
}
constexpr int rms_norm_threads(int64_t width, bool bf16) {
  const int64_t lanes = lanes_of(bf16) * rms_norm_vectors(width, bf16);
  return static_cast<int>(((width + lanes - 1) / lanes + 31) / 32 * 32);
}

/// Widths of whole vectors, up to 16384 in bf16 and 8192 in fp32.
constexpr bool rms_norm_takes(int64_t width, bool bf16) {
  return width > 0 && width % lanes_of(bf16) == 0 && width / lanes_of(bf16) <= 2048;
}

/// Blocks of backward, each with its own sum: 1024 threads for each of 132 multiprocessors, on whatever GPU, so that sums have one order.
constexpr int64_t rms_norm_partials(int64_t rows, int64_t width, bool bf16) {
  return std::min<int64_t>(rows, 132 * 1024 / rms_norm_threads(width, bf16));
}

void rms_norm(const RmsNorm&, CUstream_st*);
void rms_norm_backward(const RmsNormBackward&, CUstream_st*);

}  // namespace upcycle::cuda
