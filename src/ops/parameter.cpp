#include "ops/parameter.hpp"

#include <utility>

namespace upcycle {

bool Parameter::overwrites() {
  squares = Tensor();
  return std::exchange(outdated, false);
}

const Tensor& Parameter::sums() {
  squares = Tensor();
  if (std::exchange(outdated, false)) main_grad.zero_();
  return main_grad;
}

}  // namespace upcycle
