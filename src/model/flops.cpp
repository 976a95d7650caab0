#include "model/flops.hpp"

#include <array>
#include <utility>

namespace upcycle {

double flops_per_token(const Architecture& a, int64_t sequence) {
  const double q = static_cast<double>(a.heads * a.head_dim), kv = static_cast<double>(a.kv_heads * a.head_dim);
  const double hidden = static_cast<double>(a.hidden), layers = static_cast<double>(a.layers);
  const double moe_layers = static_cast<double>(a.num_moe_layers());
  const double attention = layers * hidden * (2 * q + 2 * kv);
  const double dense = (layers - moe_layers) * 3 * hidden * static_cast<double>(a.ffn);
  const double experts = moe_layers * static_cast<double>(a.top_k) * 3 * hidden * static_cast<double>(a.expert_ffn);
  const double head = hidden * static_cast<double>(a.vocab);
  return 6 * (attention + dense + experts + head) + 6 * layers * q * static_cast<double>(sequence);
}

double peak_flops(const std::string& gpu_name) {
  static const std::array<std::pair<const char*, double>, 5> kPeaks = {{
      {"H100 PCIe", 756e12}, {"H100", 989.4e12}, {"H200", 989.4e12}, {"GH200", 989.4e12}, {"A100", 312e12}}};
  for (const auto& [name, peak] : kPeaks) {
    if (gpu_name.find(name) != std::string::npos) return peak;
  }
  return 0.0;
}

}  // namespace upcycle
