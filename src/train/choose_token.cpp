#include "train/choose_token.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>
#include <vector>

namespace upcycle {

int64_t choose_token(const Tensor& logits_V, const TokenChoice& choice, double uniform) {
  const Tensor host = logits_V.to(at::kCPU, at::kDouble).contiguous();
  const double* logit = host.const_data_ptr<double>();
  const auto vocab = static_cast<size_t>(host.numel());
  if (std::any_of(logit, logit + vocab, [](double x) { return std::isnan(x); })) {
    throw std::runtime_error("the model's logits are not numbers: are its weights whole? `upcycle verify` looks at all of them");
  }
  const auto best = static_cast<size_t>(std::max_element(logit, logit + vocab) - logit);   // the first of equals
  if (choice.temperature == 0) return static_cast<int64_t>(best);

  std::vector<double> probability(vocab);   // but for a factor
  std::transform(logit, logit + vocab, probability.begin(), [&](double x) { return std::exp((x - logit[best]) / choice.temperature); });
  std::vector<int64_t> order(vocab);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return probability[a] > probability[b]; });
  const double all = std::accumulate(probability.begin(), probability.end(), 0.0);
  size_t kept = 0;
  double mass = 0.0;
  while (kept < vocab && (kept == 0 || mass < choice.top_p * all)) mass += probability[order[kept++]];
  double left = uniform * mass;
  for (size_t i = 0; i + 1 < kept; ++i) {
    if (left < probability[order[i]]) return order[i];
    left -= probability[order[i]];
  }
  return order[kept - 1];
}

}  // namespace upcycle
