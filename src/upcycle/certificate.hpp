#pragma once
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "upcycle/grow.hpp"

// The certificate of an upcycled model: is it what its recipe promises? Pure judging: whoever has the weights and runs the models
// (train/certify.cpp) adds what it saw; ranks pack, gather and merge; the verdict follows.
namespace upcycle {

/// Weight level: values of the mixture held against the dense ones, bit for bit.
struct WeightLevel {
  int64_t comparisons = 0;     ///< replicas included
  int64_t mismatches = 0;
  int64_t altered = 0;         ///< differ, as `noise` and `drop` may
  std::string first_mismatch;  ///< tensor, place, both values
  std::map<std::string, std::vector<Box>> covered;

  /// Checks `box` of `spec`, as the mixture has it (CPU; fp32, or the dtype that it is stored in).
  /// Experts: the dense slice times the recipe's factor, the order of hidden units being one (each unit once). Router rows: finite, tied inside a copy, different between copies.
  /// Of several sources: a copy's slice is of its own source, the rest their mean.
  /// Out of a mixture, experts and router rows: the source's of the same name. The rest: the dense tensor. Expected values are rounded to `value`'s dtype. Knows nothing of how grow() works.
  void check(const ParameterSpec& spec, const Box& box, const Tensor& value, const Recipe& recipe, const ReadDense& read);
  void merge(const WeightLevel& other);
};

/// How far `other` is from `reference`, over any number of parts.
struct Difference {
  double difference2 = 0, reference2 = 0;   ///< sums of squares, fp64
  double max_abs = 0;                       ///< NaN once a value was not finite
  void add(const Tensor& reference, const Tensor& other);
  void merge(const Difference& other);
  double relative_l2() const;
};

/// What the routers of a mixture chose, over (token, layer) pairs.
struct RoutingCount {
  int64_t pairs = 0;
  int64_t near_ties = 0;   ///< the copies at the top-k boundary are closer than 1e-6 of the larger logit: rounding may swap them
  int64_t bf16_ties = 0;   ///< the same logits, rounded to bf16, tie there
  int64_t complete = 0;    ///< the chosen experts are whole copies
  /// `logits` [T, N], any float dtype, any device; `expert` [T, K] int64, the choice.
  void add(const Tensor& logits_TN, const Tensor& expert_TK, int64_t granularity);
  void merge(const RoutingCount& other);
};

/// Function level: dense model and mixture on the same tokens, in one precision.
struct FunctionLevel {
  std::string precision;   ///< "float32", "bfloat16"
  std::map<int64_t, Difference> layers;   ///< of a layer's feed-forward, on the same input
  Difference logits;
  RoutingCount routing;
  int64_t tokens = 0;
  double divergence = 0, dense_loss = 0, moe_loss = 0;   ///< sums over tokens, nats

  /// Logits [T, V] of both models (any device) and labels [T]: logits, KL(dense || mixture), both losses, tokens.
  void add_logits(const Tensor& dense_TV, const Tensor& moe_TV, const Tensor& labels_T);
  void merge(const FunctionLevel& other);
  double worst_layer() const;   ///< largest relative_l2 of `layers`
};

/// fp32, relative L2 of logits and of every feed-forward: what "exact" means.
inline constexpr double kExactTolerance = 1e-5;

class Certificate {
 public:
  explicit Certificate(const Recipe& recipe) : recipe_(recipe) {}

  WeightLevel weights;
  std::vector<FunctionLevel> functions;   ///< empty: weights alone were judged; the same precisions, in order, on all ranks

  /// This rank's evidence as text, for an all-gather; merge() adds another rank's.
  std::string pack() const;
  void merge(const std::string& packed);

  /// What speaks against it, one line each; empty: passed. Missing parts of the mixture, wrong weights, values that are not finite
  /// and, for an exact recipe, a relative difference above kExactTolerance in fp32.
  std::vector<std::string> objections() const;
  bool passed() const { return objections().empty(); }
  nlohmann::json to_json() const;
  /// For people.
  std::string table() const;

 private:
  Recipe recipe_;
};

}  // namespace upcycle
