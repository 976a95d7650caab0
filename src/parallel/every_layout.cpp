#include "parallel/every_layout.hpp"

#include <array>

namespace upcycle {
namespace {

std::vector<int> divisors(int number) {
  std::vector<int> out;
  for (int i = 1; i <= number; ++i) {
    if (number % i == 0) out.push_back(i);
  }
  return out;
}

/// Ordered pairs whose product divides `number`: two degrees of a factoring, the third is what remains.
std::vector<std::array<int, 2>> pairs_dividing(int number) {
  std::vector<std::array<int, 2>> out;
  for (const int first : divisors(number)) {
    for (const int second : divisors(number / first)) out.push_back({first, second});
  }
  return out;
}

}  // namespace

std::vector<ParallelSection> every_layout(int world) {
  std::vector<ParallelSection> layouts;
  for (const int pipeline : divisors(world)) {
    const auto factorings = pairs_dividing(world / pipeline);
    for (const auto& [tensor, context] : factorings) {
      for (const auto& [expert, expert_tensor] : factorings) {
        for (int virtual_stages = 1; virtual_stages <= (pipeline > 1 ? 2 : 1); ++virtual_stages) {
          for (const int zero : {0, 1}) {
            layouts.push_back({.tensor = tensor,
                               .context = context,
                               .pipeline = pipeline,
                               .virtual_stages = virtual_stages,
                               .expert = expert,
                               .expert_tensor = expert_tensor,
                               .zero = zero});
          }
        }
      }
    }
  }
  return layouts;
}

}  // namespace upcycle
