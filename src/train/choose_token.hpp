#pragma once
#include <cstdint>

#include "base/tensor.hpp"

namespace upcycle {

/// How a token is chosen from a model's probabilities.
struct TokenChoice {
  double temperature = 0.0;   ///< logits are divided by it; 0: always the likeliest token
  double top_p = 1.0;         ///< only among the likeliest that together have this probability (Holtzman et al., 1904.09751)
};

/// The token that `uniform`, from [0, 1), picks of logits [V], any dtype and device. Equally likely tokens count by their number. Computed
/// in fp64 on the CPU. Throws std::runtime_error when a logit is not a number.
int64_t choose_token(const Tensor& logits_V, const TokenChoice& choice, double uniform);

}  // namespace upcycle
