// T tokens, N experts, K experts per token, G shards of a copy, C copies, V vocabulary
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/norm.h>

#include <cmath>
#include <limits>

#include "base/error.hpp"
#include "upcycle/certificate.hpp"

namespace upcycle {

namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

double worse(double a, double b) { return std::isnan(a) || std::isnan(b) ? kNaN : std::max(a, b); }

}  // namespace

void Difference::add(const Tensor& reference, const Tensor& other) {
  if (reference.sizes() != other.sizes()) throw std::logic_error("two models' tensors have different shapes");
  if (reference.numel() == 0) return;
  const Tensor r = reference.detach().to(at::kDouble), d = other.detach().to(at::kDouble) - r;
  difference2 += d.square().sum().item<double>();
  reference2 += r.square().sum().item<double>();
  max_abs = worse(max_abs, d.abs().max().item<double>());
}

void Difference::merge(const Difference& other) {
  difference2 += other.difference2;
  reference2 += other.reference2;
  max_abs = worse(max_abs, other.max_abs);
}

double Difference::relative_l2() const {
  if (difference2 == 0) return 0;
  return std::sqrt(difference2 / reference2);   // infinite when the reference is all zeros, NaN when a value was
}

void RoutingCount::add(const Tensor& logits_TN, const Tensor& expert_TK, int64_t granularity) {
  const int64_t T = logits_TN.size(0), N = logits_TN.size(1), K = expert_TK.size(1), G = granularity, C = N / G, whole = K / G;
  pairs += T;
  const Tensor sorted_TK = std::get<0>(expert_TK.sort(1));
  if (K % G == 0) {
    // Sorted, whole copies are runs of G numbers, each starting at a multiple of G.
    const Tensor runs = sorted_TK.reshape({T, whole, G});
    const Tensor from_start = runs - runs.select(2, 0).unsqueeze(2);
    const Tensor starts = runs.select(2, 0).remainder(G).eq(0).all(1);
    const Tensor steps = from_start.select(2, G - 1).eq(G - 1).all(1);
    complete += starts.logical_and(steps).sum().item<int64_t>();
  }
  if (whole < 1 || whole >= C) return;   // no copy is left out: no boundary
  const Tensor copy_TC = logits_TN.detach().to(at::kFloat).reshape({T, C, G}).select(2, 0);
  const auto gaps = [&](const Tensor& x) {
    const Tensor best = std::get<0>(x.sort(1, /*descending=*/true));
    return std::pair(best.select(1, whole - 1), best.select(1, whole));
  };
  const auto [in, out] = gaps(copy_TC);
  near_ties += (in - out).le(in.abs().maximum(out.abs()) * 1e-6).sum().item<int64_t>();
  const auto [in16, out16] = gaps(copy_TC.to(at::kBFloat16).to(at::kFloat));
  bf16_ties += in16.eq(out16).sum().item<int64_t>();
}

void RoutingCount::merge(const RoutingCount& other) {
  pairs += other.pairs;
  near_ties += other.near_ties;
  bf16_ties += other.bf16_ties;
  complete += other.complete;
}

void FunctionLevel::add_logits(const Tensor& dense_TV, const Tensor& moe_TV, const Tensor& labels_T) {
  logits.add(dense_TV, moe_TV);
  const Tensor p = at::log_softmax(dense_TV.detach().to(at::kDouble), 1), q = at::log_softmax(moe_TV.detach().to(at::kDouble), 1);
  const Tensor label = labels_T.reshape({-1, 1});
  divergence += (p.exp() * (p - q)).sum().item<double>();
  dense_loss -= p.gather(1, label).sum().item<double>();
  moe_loss -= q.gather(1, label).sum().item<double>();
  tokens += labels_T.numel();
}

void FunctionLevel::merge(const FunctionLevel& other) {
  if (precision != other.precision) throw std::logic_error("evidence of different precisions: " + precision + " and " + other.precision);
  for (const auto& [layer, difference] : other.layers) layers[layer].merge(difference);
  logits.merge(other.logits);
  routing.merge(other.routing);
  tokens += other.tokens;
  divergence += other.divergence;
  dense_loss += other.dense_loss;
  moe_loss += other.moe_loss;
}

double FunctionLevel::worst_layer() const {
  double worst = 0;
  for (const auto& [layer, difference] : layers) worst = worse(worst, difference.relative_l2());
  return worst;
}

}  // namespace upcycle
