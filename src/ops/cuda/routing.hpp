#pragma once
#include <cstdint>

struct CUstream_st;

// Shapes: T tokens, K choices of each, E experts, P parts of the micro-batch, N blocks of the first kernel. All in row-major order, on one
// GPU. Every launch returns at once; all sums are the same in every run.
namespace upcycle::cuda {

/// The most experts that these kernels take.
constexpr int kMostExperts = 1024;
/// Sums of probabilities are whole numbers of this: their order does not matter then, and 2^27 tokens fit into 64 bits.
constexpr double kProbabilityUnit = 0x1p-36;

/// From the logits to choices, weights, counts and the sums of the balance losses: one pass.
struct RoutingForward {
  const float* logits_TE;
  const float* bias_E;         ///< added for the choice alone; null: none
  const int64_t* given_TK;     ///< the choice; null: choose
  int64_t* expert_TK;          ///< out, unless given
  float* weight_TK;            ///< out
  float* log_sum_T;            ///< out: log of the sum of exponentials
  int64_t* count_E;            ///< added to: the choices per expert
  // Of the balance losses; all null: not asked for.
  const int64_t* part_T;       ///< which part each token belongs to; null: there is one
  int64_t* count_PE;           ///< added to, where part_T is given: the choices per part
  int64_t* probability_PE;     ///< added to: sums of probabilities, in units of kProbabilityUnit
  float* measure_N2;           ///< out: sums of log_sum^2 and of the entropy over a block's tokens
  int64_t tokens;
  int experts, top_k;
  bool renormalise;            ///< weights are softmax over the chosen logits; else probabilities over all experts
};
/// N, for as many tokens and experts.
int64_t routing_blocks(int64_t tokens, int experts);
void routing_forward(const RoutingForward&, CUstream_st*);

/// From counts and sums over the micro-batch to shares and measures, added into a router's statistics.
struct RoutingMeasures {
  const int64_t* count_PE;         ///< choices, of which the shares are made; null: all experts alike
  double choices;                  ///< of one part; 0: as many as it counts (P = 1)
  const int64_t* probability_PE;
  const float* measure_N2;
  int64_t blocks;                  ///< N
  double tokens;                   ///< of the micro-batch on all ranks
  const int64_t* count_E;          ///< this rank's choices
  float* share_PE;                 ///< out: choices / all choices of the part
  int64_t* seen_E;                 ///< statistics: count_E is added
  double* measures_3;              ///< statistics: [sum share * probability * E / tokens, sum log_sum^2 / tokens, entropy / tokens] are added
  bool first;                      ///< written to the statistics, not added
  int64_t parts;
  int experts;
};
void routing_measures(const RoutingMeasures&, CUstream_st*);

/// The gradient of the logits, from that of the weights and the coefficients of the balance losses: one pass.
struct RoutingBackward {
  const float* logits_TE;
  const float* log_sum_T;
  const int64_t* expert_TK;
  const float* weight_TK;
  const float* d_weight_TK;
  const float* share_PE;       ///< null: no balance loss
  const int64_t* part_T;       ///< null: one part
  float aux;                   ///< of d(loss) / d(probability) = aux * share
  float z;                     ///< of d(loss) / d(log_sum) = z * log_sum
  float* d_logits_TE;          ///< out
  int64_t tokens;
  int experts, top_k;
  bool renormalise;
};
void routing_backward(const RoutingBackward&, CUstream_st*);

}  // namespace upcycle::cuda
