#include "train/learning_rate.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace upcycle {

double learning_rate(const OptimizerSection& o, int64_t steps, int64_t step) {
  if (step <= o.warmup) return o.lr * static_cast<double>(step) / static_cast<double>(o.warmup);
  const auto share = [&](int64_t from) {
    return std::clamp(static_cast<double>(step - from) / static_cast<double>(std::max<int64_t>(1, steps - from)), 0.0, 1.0);
  };
  const auto between = [&](double high) { return o.min_lr + (o.lr - o.min_lr) * high; };
  switch (o.schedule) {
    case Schedule::constant: return o.lr;
    case Schedule::linear: return between(1.0 - share(o.warmup));
    case Schedule::cosine: return between(0.5 * (1.0 + std::cos(std::numbers::pi * share(o.warmup))));
    case Schedule::inverse_sqrt: {
      const double reference = static_cast<double>(std::max<int64_t>(o.warmup, 1));
      return std::max(o.min_lr, o.lr * std::sqrt(reference / static_cast<double>(step)));
    }
    case Schedule::wsd: return between(1.0 - share(std::max(o.warmup, steps - o.decay)));
  }
  return o.lr;
}

}  // namespace upcycle
