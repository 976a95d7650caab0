#include "train/replicas.hpp"

#include <stdexcept>
#include <utility>

#include "base/error.hpp"

namespace upcycle {

Replicas::Replicas(Weights& weights, const Mesh& mesh)
    : weights_(weights),
      beside_(weights.buckets().front().gradients.device()),
      values_arrived_(weights.buckets().size()),
      additions_(weights.buckets().size(), 0) {
  const size_t rank = static_cast<size_t>(mesh.world().rank());
  for (const Partition& leaders : weights.groups().partitions()) groups_.push_back(mesh.group(leaders[rank]));
  for (size_t bucket = 0; bucket < weights.buckets().size(); ++bucket) {
    for (const size_t weight : weights.buckets()[bucket].weights) {
      Parameter& parameter = weights.all()[weight].parameter;
      parameter.added = [this, bucket] { added(bucket); };
      parameter.before_use = [this, bucket] { wait_for_values(bucket); };
    }
  }
}

Replicas::~Replicas() {
  for (Weight& weight : weights_.all()) {
    weight.parameter.arrived();
    weight.parameter.added = weight.parameter.before_use = nullptr;
  }
}

void Replicas::added(size_t bucket) {
  ++additions_[bucket];
  if (expected_.empty()) return;
  // Strictly in the buckets' order, whichever is complete first: ranks that launched two groups' sums in different order would wait
  // for each other for ever. A group that spans stages waits for the end: here it would hold up the messages of the pipeline.
  while (next_ < additions_.size() && !weights_.buckets()[next_].place.spans_stages && additions_[next_] == expected_[next_]) launch_next();
}

void Replicas::launch_next() {
  Bucket& bucket = weights_.buckets()[next_++];
  const Communicator& group = groups_[bucket.group];
  if (group.size() == 1) return;
  beside_.run([&] { bucket.divided() ? group.reduce_into_own_part(bucket.gradients) : group.all_reduce(bucket.gradients); });
}

void Replicas::sum_gradients() {
  while (next_ < additions_.size()) launch_next();
  beside_.join();
  if (expected_.empty()) expected_ = additions_;
  if (additions_ != expected_) throw std::logic_error("this step added to some gradient more or less often than the first: its sum came too early");
  additions_.assign(additions_.size(), 0);
  next_ = 0;
}

void Replicas::share_values() {
  for (size_t index = weights_.buckets().size(); index-- > 0;) {   // forward wants the last bucket first
    Bucket& bucket = weights_.buckets()[index];
    if (!bucket.divided()) continue;
    beside_.run([&] { groups_[bucket.group].gather_from_own_part(bucket.values); });
    values_arrived_[index] = beside_.mark();
  }
}

void Replicas::wait_for_values(size_t bucket) {
  if (const auto mark = std::exchange(values_arrived_[bucket], nullptr)) device::SideStream::wait(mark, weights_.buckets()[bucket].values.device());
}

}  // namespace upcycle
