#include "model/key_values.hpp"

#include <ATen/ops/empty.h>

#include "base/error.hpp"

namespace upcycle {

std::pair<Tensor, Tensor> KeyValues::with(int64_t layer, const Tensor& k_BSGD, const Tensor& v_BSGD) {
  const int64_t end = length_ + k_BSGD.size(1);
  if (end > room_) throw std::logic_error(text("position ", end - 1, " where there is room for ", room_));
  auto& [k, v] = of_layer_[layer];
  const auto put = [&](Tensor& all, const Tensor& next) {
    if (!all.defined()) all = at::empty({next.size(0), room_, next.size(2), next.size(3)}, next.options());
    all.narrow(1, length_, next.size(1)).copy_(next);
    return all.narrow(1, 0, end);
  };
  const Tensor k_BPGD = put(k, k_BSGD);
  return {k_BPGD, put(v, v_BSGD)};
}

}  // namespace upcycle
