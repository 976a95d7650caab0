#include "model/weights.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <set>

#include "base/autograd.hpp"
#include "base/error.hpp"

namespace upcycle {

Weights::Weights(const Architecture& architecture, const Layout& layout, const Coordinates& here)
    : architecture_(architecture), layout_(layout), here_(here), catalogue_(catalogue(architecture)) {}

Parameter& Weights::add(const std::vector<std::string>& names, int64_t dim) {
  Weight weight;
  for (const std::string& name : names) {
    const ParameterSpec& spec = find(catalogue_, name);
    const std::optional<Box> box = local_box(spec, layout_, here_);
    if (!box) throw std::logic_error(text(name, " is not of this rank's stage"));
    const int64_t begin = weight.parts.empty() ? 0 : weight.shape[dim];
    if (weight.parts.empty()) {
      weight.shape = box->size;
    } else {
      weight.shape[dim] += box->size[dim];
    }
    weight.parts.push_back({spec, *box, dim, begin});
  }
  return weights_.emplace_back(std::move(weight)).parameter;
}

void Weights::allocate(at::ScalarType compute, at::Device device) {
  const auto fp32 = at::TensorOptions(at::kFloat).device(device);
  for (Weight& weight : weights_) {
    Parameter& p = weight.parameter;
    p.master = at::empty(weight.shape, fp32);
    p.value = compute == at::kFloat || weight.spec().always_fp32() ? p.master : at::empty(weight.shape, fp32.dtype(compute));
  }
  for (const Axis axis : {Axis::replica, Axis::expert_data}) {
    int64_t size = 0;
    for (const Weight& weight : weights_) size += weight.spec().gradient_axis() == axis ? elements(weight.shape) : 0;
    if (size == 0) continue;
    Tensor flat = at::zeros({size}, fp32);
    int64_t begin = 0;
    for (Weight& weight : weights_) {
      if (weight.spec().gradient_axis() != axis) continue;
      const int64_t count = elements(weight.shape);
      weight.parameter.main_grad = flat.narrow(0, begin, count).view(weight.shape);
      begin += count;
    }
    gradients_.push_back({axis, flat});
  }
}

int64_t Weights::copies(const ParameterSpec& spec) const {
  // Ranks of one stage, by the boxes they hold. Few distinct boxes, so a set of their corners is enough.
  std::set<Shape> distinct;
  int64_t holders = 0;
  for (int rank = 0; rank < layout_.grid.world(); ++rank) {
    if (const auto box = local_box(spec, layout_, layout_.grid.at(rank))) {
      distinct.insert(box->begin);
      ++holders;
    }
  }
  return holders / static_cast<int64_t>(distinct.size());
}

void Weights::publish() {
  const Unrecorded guard;
  for (Weight& weight : weights_) {
    Parameter& p = weight.parameter;
    if (!p.value.is_alias_of(p.master)) p.value.copy_(p.master);
  }
}

ComputeWithMasters::ComputeWithMasters(Weights& weights) : weights_(weights) {
  for (Weight& weight : weights_.all()) values_.push_back(std::exchange(weight.parameter.value, weight.parameter.master));
}

ComputeWithMasters::~ComputeWithMasters() {
  size_t next = 0;
  for (Weight& weight : weights_.all()) weight.parameter.value = std::move(values_[next++]);
}

}  // namespace upcycle
