// swiglu
#include <ATen/ops/sigmoid.h>

#include "ops/swiglu.hpp"
#include "unit/ops/reference.hpp"

namespace upcycle {
namespace {

TEST(Swiglu, IsTheFormula) {
  const Op ours = [](const auto& x, auto&) { return swiglu(x[0]); };
  const Formula formula = [](const auto& x, const auto&) {
    const int64_t width = x[0].size(-1) / 2;
    const Tensor gate = x[0].narrow(-1, 0, width), up = x[0].narrow(-1, width, width);
    return gate * at::sigmoid(gate) * up;
  };
  expect_matches({{{5, 34}}, {}, 2}, ours, formula);
  expect_matches({{{2, 3, 2}}, {}, 2}, ours, formula);
  expect_matches({{{0, 34}}, {}, 2}, ours, formula);
}

TEST(Swiglu, OfWeighedRows) {
  const Op ours = [](const auto& x, auto&) { return swiglu(x[0], x[1].to(at::kFloat)); };
  const Formula formula = [](const auto& x, const auto&) {
    const int64_t width = x[0].size(-1) / 2;
    const Tensor gate = x[0].narrow(-1, 0, width), up = x[0].narrow(-1, width, width);
    return gate * at::sigmoid(gate) * up * x[1];
  };
  for (const auto& [rows, width] : {std::pair{5, 17}, {1, 1}, {0, 17}}) {
    expect_matches({{{rows, 2 * width}, {rows, 1}}, {}, 3}, ours, formula);
  }
}

}  // namespace
}  // namespace upcycle
