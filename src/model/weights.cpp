#include "model/weights.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <stdexcept>
#include <utility>

#include "base/autograd.hpp"
#include "base/error.hpp"

namespace upcycle {
namespace {

/// The weight's elements, about: what it would be if every cut divided, the same on all ranks of a stage.
int64_t nominal_elements(const Weight& weight, const Grid& grid) {
  int64_t sum = 0;
  for (const Part& part : weight.parts) {
    int64_t count = elements(part.spec.shape);
    for (const Cut& cut : part.spec.cuts) count /= grid.size(cut.axis);
    sum += count;
  }
  return sum;
}

}  // namespace

Weights::Weights(const Architecture& architecture, const Layout& layout, const Coordinates& here)
    : architecture_(architecture),
      layout_(layout),
      here_(here),
      groups_(architecture, layout),
      catalogue_(catalogue(architecture)) {}

Parameter& Weights::add(const std::vector<std::string>& names, int64_t dim) {
  Weight weight;
  for (const std::string& name : names) {
    const ParameterSpec& spec = find(catalogue_, name);
    const std::optional<Box> box = local_box(spec, layout_, here_);
    if (!box) throw std::logic_error(text(name, " is not of this rank's stage"));
    if (!weight.parts.empty() && groups_.of(spec) != groups_.of(weight.spec())) {
      throw std::logic_error(text(name, " and ", weight.spec().name, " are held by different ranks: no one tensor"));
    }
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

void Weights::allocate(at::ScalarType compute, at::Device device, int64_t zero) {
  std::vector<Stored> stored;
  for (const Weight& weight : weights_) {
    const at::ScalarType dtype = weight.spec().always_fp32() ? at::kFloat : compute;
    stored.push_back({groups_.of(weight.spec()), dtype, elements(weight.shape), nominal_elements(weight, layout_.grid)});
  }
  std::vector<Place> places;
  for (size_t group = 0; group < groups_.partitions().size(); ++group) places.push_back(groups_.place(group, layout_.grid.rank(here_)));
  buckets_ = plan_buckets(stored, places, zero);

  const auto fp32 = at::TensorOptions(at::kFloat).device(device);
  for (Bucket& bucket : buckets_) {
    bucket.values = at::zeros({bucket.size}, fp32.dtype(bucket.dtype));
    bucket.gradients = at::zeros({bucket.size}, fp32);
    const bool exact = bucket.dtype == at::kFloat, borrowed = !exact && bucket.divided();
    const Tensor masters = exact ? bucket.values : borrowed ? bucket.gradients : at::zeros({bucket.size}, fp32);
    for (size_t i = 0; i < bucket.weights.size(); ++i) {
      Weight& weight = weights_[bucket.weights[i]];
      const auto view = [&](const Tensor& flat) { return flat.narrow(0, bucket.runs[i].begin, bucket.runs[i].size()).view(weight.shape); };
      weight.parameter.value = view(bucket.values);
      weight.parameter.master = view(masters);
      if (!borrowed) weight.parameter.main_grad = view(bucket.gradients);
    }
    bucket.masters = masters;
  }
}

void Weights::allocate_for_inference(at::ScalarType compute, at::Device device) {
  for (Weight& weight : weights_) {
    const at::ScalarType dtype = weight.spec().always_fp32() ? at::kFloat : compute;
    weight.parameter.value = at::empty(weight.shape, at::TensorOptions().dtype(dtype).device(device));
  }
}

void Weights::start_training() {
  const Unrecorded guard;
  for (Bucket& bucket : buckets_) {
    if (!bucket.divided()) continue;
    if (bucket.dtype == at::kFloat) {
      bucket.masters = bucket.values.narrow(0, bucket.own.begin, bucket.own.size());
      continue;
    }
    bucket.masters = bucket.gradients.narrow(0, bucket.own.begin, bucket.own.size()).clone();
    bucket.gradients.zero_();
    for (size_t i = 0; i < bucket.weights.size(); ++i) {
      Weight& weight = weights_[bucket.weights[i]];
      weight.parameter.main_grad = std::exchange(weight.parameter.master, {});
    }
  }
}

void Weights::publish() {
  const Unrecorded guard;
  for (Bucket& bucket : buckets_) {
    if (bucket.dtype == at::kFloat) continue;
    const bool whole = bucket.masters.numel() == bucket.size;
    (whole ? bucket.values : bucket.values.narrow(0, bucket.own.begin, bucket.own.size())).copy_(bucket.masters);
  }
}

ComputeWithMasters::ComputeWithMasters(Weights& weights) : weights_(weights) {
  for (Weight& weight : weights_.all()) {
    if (!weight.parameter.master.defined()) throw std::logic_error("in training with ZeRO-1 no rank has whole masters to compute with");
    values_.push_back(std::exchange(weight.parameter.value, weight.parameter.master));
  }
}

ComputeWithMasters::~ComputeWithMasters() {
  size_t next = 0;
  for (Weight& weight : weights_.all()) weight.parameter.value = std::move(values_[next++]);
}

}  // namespace upcycle
