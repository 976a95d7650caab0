#pragma once
#include <cstdint>

#include "config/run_config.hpp"

namespace upcycle {

/// The learning rate of update number `step` (the first is 1) of a run of `steps`.
/// Warm-up is linear from 0: lr * step / warmup. Then, with r the share of what follows that is done:
///   constant      lr
///   linear        min + (lr - min) (1 - r)
///   cosine        min + (lr - min) (1 + cos(pi r)) / 2           (Loshchilov & Hutter, 1608.03983)
///   inverse-sqrt  max(min, lr * sqrt(max(warmup, 1) / step))     (Vaswani et al., 1706.03762)
///   wsd           lr, then over the last `decay` steps linearly to min (Hu et al., 2404.06395)
double learning_rate(const OptimizerSection&, int64_t steps, int64_t step);

}  // namespace upcycle
