// A token belongs to a group of G lanes of a warp; lane i of it has experts i, i + G, ... i + (R - 1) G in registers.
#include "ops/cuda/launch.cuh"
#include "ops/cuda/routing.hpp"

#include <type_traits>

namespace upcycle::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr unsigned kAll = 0xffffffffu;

template <int G>
__device__ __forceinline__ float group_sum(float x) {
  for (int lanes = G / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAll, x, lanes);
  return x;
}
template <int G>
__device__ __forceinline__ float group_max(float x) {
  for (int lanes = G / 2; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAll, x, lanes));
  return x;
}
template <int G>
__device__ __forceinline__ unsigned long long group_max(unsigned long long x) {
  for (int lanes = G / 2; lanes > 0; lanes /= 2) {
    const unsigned long long other = __shfl_xor_sync(kAll, x, lanes);
    x = other > x ? other : x;
  }
  return x;
}

__device__ __forceinline__ void add_to(int64_t* sum, long long x) {
  atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(x));
}

__device__ __forceinline__ long long in_units(float probability) {
  return __float2ll_rn(probability * static_cast<float>(1 / kProbabilityUnit));
}

// A number that orders like the float; + 0.0 makes -0 equal 0 (choose_experts in moe/router.cpp is the same rule).
__device__ __forceinline__ unsigned order_of(float logit) {
  const int bits = __float_as_int(__fadd_rn(logit, 0.0f));
  return static_cast<unsigned>(bits >= 0 ? bits : bits ^ 0x7fffffff) ^ 0x80000000u;
}

// How many tokens one block takes: enough that its sums cost little, few enough that all multiprocessors have work.
template <int G>
constexpr int kRounds = G >= 32 ? 4 : 2;
template <int G>
constexpr int kTokens = kThreads / G * kRounds<G>;

template <int G, int R>
__global__ void __launch_bounds__(kThreads) route(RoutingForward a) {
  extern __shared__ float shared[];
  __shared__ float of_warps[32];
  float* const sum_WE = shared;                                             // [warps, E], where measures are asked for
  int* const count_E = reinterpret_cast<int*>(shared + (a.probability_PE != nullptr ? kWarps * a.experts : 0));
  const int group = threadIdx.x / G, lane = threadIdx.x % G, E = a.experts, K = a.top_k;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * kTokens<G>;
  const bool measures = a.probability_PE != nullptr;

  // Tokens of one part are summed in the block; where two parts meet, token by token.
  int64_t part = 0;
  bool one_part = true;
  if (a.part_T != nullptr) {
    part = a.part_T[begin];
    const int64_t token = begin + threadIdx.x;
    one_part = __syncthreads_and(static_cast<int>(threadIdx.x) >= kTokens<G> || token >= a.tokens || a.part_T[token] == part) != 0;
  }
  for (int e = threadIdx.x; e < E; e += kThreads) count_E[e] = 0;
  __syncthreads();

  float sum[R] = {}, z = 0.0f, entropy = 0.0f;
#pragma unroll 1
  for (int round = 0; round < kRounds<G>; ++round) {
    const int64_t wanted = begin + round * (kThreads / G) + group;
    const bool live = wanted < a.tokens;
    const int64_t token = live ? wanted : a.tokens - 1;                     // all lanes go along: shuffles need them
    const float* const row_E = a.logits_TE + token * E;
    int64_t* const expert_K = a.expert_TK + token * K;
    const int64_t* const chosen_K = a.given_TK != nullptr ? a.given_TK + token * K : expert_K;

    float logit[R], most = -INFINITY;
#pragma unroll
    for (int i = 0; i < R; ++i) {
      const int e = lane + i * G;
      logit[i] = e < E ? row_E[e] : -INFINITY;
      most = fmaxf(most, logit[i]);
    }
    most = group_max<G>(most);
    float exponential[R], total = 0.0f;
#pragma unroll
    for (int i = 0; i < R; ++i) {
      exponential[i] = expf(logit[i] - most);
      total += exponential[i];
    }
    total = group_sum<G>(total);
    const float log_sum = most + logf(total);
    if (live && lane == 0) a.log_sum_T[token] = log_sum;

    if (measures) {
      float mean_logit = 0.0f;
#pragma unroll
      for (int i = 0; i < R; ++i) {
        const float probability = exponential[i] / total;
        const int e = lane + i * G;
        if (e < E) mean_logit += probability * logit[i];
        if (live) sum[i] += probability;
        if (live && !one_part && e < E) add_to(a.probability_PE + a.part_T[token] * E + e, in_units(probability));
      }
      mean_logit = group_sum<G>(mean_logit);
      if (live && lane == 0) {
        z += log_sum * log_sum;
        entropy += log_sum - mean_logit;                                     // - sum p log p, log p = logit - log sum
      }
    }

    // K times the best of those that are left: lane k % G keeps choice k.
    int mine = 0;
    if (a.given_TK == nullptr) {
      unsigned order[R], taken = 0;
#pragma unroll
      for (int i = 0; i < R; ++i) {
        const int e = lane + i * G;
        order[i] = order_of(e < E && a.bias_E != nullptr ? __fadd_rn(logit[i], a.bias_E[e]) : logit[i]);
        if (e >= E) taken |= 1u << i;
      }
      for (int k = 0; k < K; ++k) {
        unsigned best = 0;
        int at = -1;
#pragma unroll
        for (int i = 0; i < R; ++i) {
          if ((taken >> i & 1u) == 0 && (at < 0 || order[i] > best)) best = order[i], at = i;
        }
        const unsigned from_end = static_cast<unsigned>(E - (lane + at * G));   // of equals the lower index
        const unsigned long long key = at < 0 ? 0 : static_cast<unsigned long long>(best) << 32 | from_end;
        const int winner = E - static_cast<int>(static_cast<unsigned>(group_max<G>(key)));
        if (winner % G == lane) taken |= 1u << (winner / G);
        if (k % G == lane) {
          if (k < G) mine = winner;
          if (live) expert_K[k] = winner;
        }
      }
    } else if (lane < K) {
      mine = static_cast<int>(chosen_K[lane]);
    }

    // A lane reads back only what it has written itself.
    const auto expert_of = [&](int k) { return k < G ? mine : static_cast<int>(chosen_K[k]); };
    float highest = most, weights = total;
    if (a.renormalise) {
      highest = -INFINITY, weights = 0.0f;
      if (live) {
        for (int k = lane; k < K; k += G) highest = fmaxf(highest, row_E[expert_of(k)]);
      }
      highest = group_max<G>(highest);
      if (live) {
        for (int k = lane; k < K; k += G) weights += expf(row_E[expert_of(k)] - highest);
      }
      weights = group_sum<G>(weights);
    }
    if (live) {
      for (int k = lane; k < K; k += G) {
        const int e = expert_of(k);
        a.weight_TK[token * K + k] = expf(row_E[e] - highest) / weights;
        atomicAdd(count_E + e, 1);
        if (!one_part) add_to(a.count_PE + a.part_T[token] * E + e, 1);
      }
    }
  }

  if (measures) {
#pragma unroll
    for (int i = 0; i < R; ++i) {
      for (int lanes = G; lanes < 32; lanes *= 2) sum[i] += __shfl_xor_sync(kAll, sum[i], lanes);
      const int e = lane + i * G;
      if (threadIdx.x % 32 < G && e < E) sum_WE[threadIdx.x / 32 * E + e] = sum[i];
    }
    z = block_sum(z, of_warps);
    entropy = block_sum(entropy, of_warps);
    if (threadIdx.x == 0) a.measure_N2[2 * blockIdx.x] = z, a.measure_N2[2 * blockIdx.x + 1] = entropy;
  }
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += kThreads) {
    if (count_E[e] != 0) {
      add_to(a.count_E + e, count_E[e]);
      if (a.part_T != nullptr && one_part) add_to(a.count_PE + part * E + e, count_E[e]);
    }
    if (measures && one_part) {
      float of_block = 0.0f;
      for (int warp = 0; warp < kWarps; ++warp) of_block += sum_WE[warp * E + e];
      add_to(a.probability_PE + part * E + e, in_units(of_block));
    }
  }
}

// Rows in shared memory so far apart that the groups of a warp meet in few banks.
template <int G, int R>
constexpr int kStride = G * R % 32 == 0 ? G * R + G : G * R;

template <int G, int R>
__global__ void __launch_bounds__(kThreads) route_back(RoutingBackward a) {
  extern __shared__ float shared[];
  const int group = threadIdx.x / G, lane = threadIdx.x % G, E = a.experts, K = a.top_k;
  float* const chosen_E = shared + group * kStride<G, R>;
  const int64_t wanted = static_cast<int64_t>(blockIdx.x) * (kThreads / G) + group;
  const bool live = wanted < a.tokens;
  const int64_t token = live ? wanted : a.tokens - 1;
  const float* const row_E = a.logits_TE + token * E;
  const float* const share_E = a.share_PE == nullptr ? nullptr : a.share_PE + (a.part_T != nullptr ? a.part_T[token] * E : 0);
  const float log_sum = a.log_sum_T[token];

  float dot = 0.0f;                                                          // sum_k weight_k d_weight_k
  for (int k = lane; k < K; k += G) dot += a.weight_TK[token * K + k] * a.d_weight_TK[token * K + k];
  dot = group_sum<G>(dot);

  // As forward computed them: exp(logit - log_sum) would be off by the rounding of a log_sum that is far from 0.
  float probability[R], d_probability[R], mean = 0.0f, most = -INFINITY, total = 0.0f;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const int e = lane + i * G;
    probability[i] = e < E ? row_E[e] : -INFINITY;
    most = fmaxf(most, probability[i]);
  }
  most = group_max<G>(most);
#pragma unroll
  for (int i = 0; i < R; ++i) {
    probability[i] = expf(probability[i] - most);
    total += probability[i];
  }
  total = group_sum<G>(total);
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const int e = lane + i * G;
    probability[i] /= total;
    d_probability[i] = share_E != nullptr && e < E ? a.aux * share_E[e] : 0.0f;
    mean += probability[i] * d_probability[i];
    if (e < E) chosen_E[e] = 0.0f;
  }
  mean = group_sum<G>(mean);
  __syncwarp();
  for (int k = lane; k < K; k += G) {
    const float weight = a.weight_TK[token * K + k], d = a.d_weight_TK[token * K + k];
    chosen_E[a.expert_TK[token * K + k]] = a.renormalise ? weight * (d - dot) : weight * d;
  }
  __syncwarp();
  const float of_all = a.z * log_sum - mean - (a.renormalise ? 0.0f : dot);
  if (!live) return;
#pragma unroll
  for (int i = 0; i < R; ++i) {
    const int e = lane + i * G;
    if (e < E) a.d_logits_TE[token * E + e] = probability[i] * (d_probability[i] + of_all) + chosen_E[e];
  }
}

__device__ double block_sum(double x, double* of_warps) {
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAll, x, lanes);
  __syncthreads();
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0.0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / 32; ++warp) x += of_warps[warp];
  return x;
}

// One block: there is little to do.
__global__ void measure(RoutingMeasures a) {
  __shared__ double of_warps[32];
  double choices = a.choices;
  if (a.count_PE != nullptr && choices == 0.0) {
    double count = 0.0;                                                      // whole numbers far below 2^53: exact in any order
    for (int e = threadIdx.x; e < a.experts; e += blockDim.x) count += static_cast<double>(a.count_PE[e]);
    choices = block_sum(count, of_warps);
  }
  double aux = 0.0, z = 0.0, entropy = 0.0;
  const int64_t shares = a.parts * a.experts;
  for (int64_t i = threadIdx.x; i < shares; i += blockDim.x) {
    const double count = a.count_PE != nullptr ? static_cast<double>(a.count_PE[i]) / choices : 1.0 / a.experts;
    const float share = static_cast<float>(count);
    a.share_PE[i] = share;
    aux += share * (static_cast<double>(a.probability_PE[i]) * kProbabilityUnit);
  }
  for (int64_t n = threadIdx.x; n < a.blocks; n += blockDim.x) {
    z += a.measure_N2[2 * n];
    entropy += a.measure_N2[2 * n + 1];
  }
  aux = block_sum(aux, of_warps) * (a.experts / a.tokens);
  z = block_sum(z, of_warps) / a.tokens;
  entropy = block_sum(entropy, of_warps) / a.tokens;
  if (threadIdx.x == 0) {
    // Whole numbers know no NaN: where a probability was none, the log of its sum was none, too.
    const double measures[3] = {isfinite(z) ? aux : z - z, z, entropy};
    for (int i = 0; i < 3; ++i) a.measures_3[i] = a.first ? measures[i] : a.measures_3[i] + measures[i];
  }
  for (int e = threadIdx.x; e < a.experts; e += blockDim.x) a.seen_E[e] = a.first ? a.count_E[e] : a.seen_E[e] + a.count_E[e];
}

/// action(G, R) as compile-time numbers, the smallest that hold as many experts.
template <typename Action>
void with_group(int experts, Action&& action) {
  const auto with = [&](auto group, auto registers) { action(group, registers); };
  using std::integral_constant;
  if (experts <= 4) return with(integral_constant<int, 4>{}, integral_constant<int, 1>{});
  if (experts <= 8) return with(integral_constant<int, 8>{}, integral_constant<int, 1>{});
  if (experts <= 32) return with(integral_constant<int, 8>{}, integral_constant<int, 4>{});
  if (experts <= 64) return with(integral_constant<int, 8>{}, integral_constant<int, 8>{});
  if (experts <= 128) return with(integral_constant<int, 16>{}, integral_constant<int, 8>{});
  if (experts <= 256) return with(integral_constant<int, 32>{}, integral_constant<int, 8>{});
  if (experts <= kMostExperts) return with(integral_constant<int, 32>{}, integral_constant<int, 32>{});
  throw std::logic_error("more experts than the routing kernels take");
}

}  // namespace

int64_t routing_blocks(int64_t tokens, int experts) {
  int64_t blocks = 0;
  with_group(experts, [&](auto group, auto) { blocks = (tokens + kTokens<group()> - 1) / kTokens<group()>; });
  return blocks;
}

void routing_forward(const RoutingForward& a, CUstream_st* stream) {
  if (a.tokens == 0) return;
  const unsigned blocks = static_cast<unsigned>(routing_blocks(a.tokens, a.experts));
  const size_t shared = sizeof(float) * static_cast<size_t>(a.experts) * (a.probability_PE != nullptr ? kWarps + 1 : 1);
  with_group(a.experts, [&](auto group, auto registers) { route<group(), registers()><<<blocks, kThreads, shared, stream>>>(a); });
  check_launch("routing_forward");
}

void routing_measures(const RoutingMeasures& a, CUstream_st* stream) {
  measure<<<1, 512, 0, stream>>>(a);
  check_launch("routing_measures");
}

void routing_backward(const RoutingBackward& a, CUstream_st* stream) {
  if (a.tokens == 0) return;
  with_group(a.experts, [&](auto group, auto registers) {
    constexpr int kGroups = kThreads / group();
    const size_t shared = sizeof(float) * kGroups * kStride<group(), registers()>;
    route_back<group(), registers()><<<blocks_of(a.tokens, kGroups), kThreads, shared, stream>>>(a);
  });
  check_launch("routing_backward");
}

}  // namespace upcycle::cuda
