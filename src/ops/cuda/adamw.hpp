#pragma once
#include <cstdint>

struct CUstream_st;

namespace upcycle::cuda {

/// See AdamWBuffer in ops/adamw.hpp.
struct AdamW {
  float *masters, *exp_avg, *exp_avg_sq;   ///< [size]
  const float* gradients;   ///< [size]
  void* values;             ///< bf16 [size]; null where masters are the values
  int64_t size;
  const double* stretches;  ///< [num_stretches, 3]: first element, a multiple of 4; factor of lr; of weight_decay, 0 or 1
  int num_stretches;        ///< at least 1; the first begins at 0
  double lr, beta1, beta2, eps, weight_decay;
  const float *step, *divisor, *skip;   ///< scalars
};

/// One pass: reads gradient, master and both moments, writes master, moments and value: 30 bytes an element. Where skip is 1 nothing is written.
void adamw(const AdamW&, CUstream_st*);

}  // namespace upcycle::cuda
