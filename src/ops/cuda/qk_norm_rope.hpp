// The kernels of ops/qk_norm_rope.hpp. A token's row has heads of head_dim columns one after another; rows, activations and weights begin at
// multiples of 16 bytes, all bf16 or all fp32; the table of rotations is fp32 [positions, head_dim]. Bytes moved: forward, every head of q
// and k in and out; backward, those heads and their gradients in, v's gradient in, a whole row out.
#pragma once
#include <algorithm>
#include <cstdint>

struct CUstream_st;

namespace upcycle::cuda {

/// Neighbouring heads of a row with one norm.
struct NormedHeads {
  int first, heads;     ///< of the row's heads
  const void* weight;   ///< [head_dim]
  void* y;              ///< [tokens, heads, head_dim]
};

struct QkNormRope {
  const void* qkv;      ///< [tokens, row]
  int64_t row;          ///< columns
  NormedHeads part[2];  ///< q and k, or one of them beside one without heads
  const float* cos;
  const float* sin;
  int64_t tokens, positions;   ///< sequences of `positions` tokens one after another
  int head_dim;
  float eps;
  bool bf16;
};

/// Where the gradient of some heads comes from; null: it is zero.
struct HeadGradient {
  int first, heads;
  const void* dy;                                ///< of sequence s, position p, head h: head_dim numbers from s * of_sequence + ... on
  int64_t of_sequence, of_position, of_head;     ///< in numbers; multiples of 16 bytes
};

struct NormedHeadsBackward {
  HeadGradient heads;
  const void* weight;
  float* partial;        ///< [blocks, head_dim], room for the weight gradient's first stage
  float* weight_sum;     ///< [head_dim], to which the weight gradient is added
  int blocks;
};

struct QkNormRopeBackward {
  const void* qkv;       ///< [tokens, row]
  void* d_qkv;           ///< [tokens, row]
  int64_t row;
  NormedHeadsBackward q, k;
  HeadGradient v;        ///< goes through as it is
  const float* cos;
  const float* sin;
  int64_t tokens, positions;
  int head_dim;
  float eps;
  bool bf16;
};

constexpr int kTokensOfBlock = 8;   ///< a warp has a token

/// Halves of a head that are whole vectors of 16 bytes, at most one for each lane of a warp.
constexpr bool qk_norm_rope_takes(int64_t head_dim, bool bf16) {
  const int64_t pair = 2 * (bf16 ? 8 : 4);
  return head_dim > 0 && head_dim % pair == 0 && head_dim / pair <= 32;
}

/// How many blocks of backward have q and how many k and v, by the bytes they move: two for each of 132 multiprocessors in all, on
/// whatever GPU, so that sums have one order.
struct BlocksOf {
  int q, k;
};
constexpr BlocksOf qk_norm_rope_blocks(int64_t tokens, int64_t heads, int64_t kv_heads) {
  const int64_t all = 2 * 132, most = (tokens + kTokensOfBlock - 1) / kTokensOfBlock;
  const int64_t q = std::clamp<int64_t>(all * 3 * heads / (3 * heads + 5 * kv_heads), 1, all - 1);
  return {static_cast<int>(std::min(q, most)), static_cast<int>(std::min(all - q, most))};
}

void qk_norm_rope(const QkNormRope&, CUstream_st*);
void qk_norm_rope_backward(const QkNormRopeBackward&, CUstream_st*);

}  // namespace upcycle::cuda
