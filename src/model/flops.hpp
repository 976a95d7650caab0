#pragma once
#include <cstdint>
#include <string>

#include "config/architecture.hpp"

namespace upcycle {

/// Floating-point operations of forward and backward per token of a causal sequence, nothing recomputed, as the field counts them:
/// 6 per parameter that a token multiplies with (K of N experts, the head once, no embedding lookup, no router), and
/// 6 * layers * heads * head_dim * sequence for causal attention scores and values.
double flops_per_token(const Architecture&, int64_t sequence);

/// Dense bf16 peak of a GPU in FLOP/s by its name ("NVIDIA H200"), from the maker's data sheets; 0 when it is not known.
double peak_flops(const std::string& gpu_name);

}  // namespace upcycle
