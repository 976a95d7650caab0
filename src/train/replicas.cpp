#include "train/replicas.hpp"

#include <ATen/ops/equal.h>
#include <ATen/ops/stack.h>

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "base/autograd.hpp"
#include "base/error.hpp"
#include "base/postponed.hpp"
#include "base/trace_range.hpp"

namespace upcycle {
namespace {

// Runs of a bucket begin at multiples of 64 elements, and what is between them is zero: up to the next one is whole 64-bit numbers.
constexpr int64_t kElements = 64;

Tensor sum_of_bits(const Tensor& flat, const Range& run) {
  return flat.narrow(0, run.begin, (run.size() + kElements - 1) / kElements * kElements).view(at::kLong).sum();
}

std::string name_of(const Weight& weight) {
  std::string name;
  for (const Part& part : weight.parts) name += (name.empty() ? "" : " + ") + part.spec.name;
  return name;
}

// "ranks 0, 1, 3 and rank 2 differ": the ranks that agree with each other, together.
std::string parties(const Tensor& sum_R, const std::vector<int>& ranks) {
  std::vector<std::pair<int64_t, std::vector<int>>> all;
  for (size_t i = 0; i < ranks.size(); ++i) {
    const int64_t sum = sum_R[static_cast<int64_t>(i)].item<int64_t>();
    auto party = std::find_if(all.begin(), all.end(), [&](const auto& one) { return one.first == sum; });
    if (party == all.end()) party = all.insert(party, {sum, {}});
    party->second.push_back(ranks[i]);
  }
  std::string out;
  for (const auto& [sum, members] : all) {
    out += text(out.empty() ? "" : " and ", members.size() > 1 ? "ranks " : "rank ");
    for (size_t i = 0; i < members.size(); ++i) out += text(i > 0 ? ", " : "", members[i]);
  }
  return out + " differ";
}

}  // namespace

Replicas::Replicas(Weights& weights, const Mesh& mesh)
    : weights_(weights),
      beside_(weights.buckets().front().gradients.device()),
      summed_(weights.buckets().size()),
      values_arrived_(weights.buckets().size()),
      additions_(weights.buckets().size(), 0) {
  const size_t rank = static_cast<size_t>(mesh.world().rank());
  std::vector<int> colours;
  for (const Partition& leaders : weights.groups().partitions()) {
    colours.push_back(leaders[rank]);
    std::vector<int>& members = members_.emplace_back();
    for (size_t other = 0; other < leaders.size(); ++other) {
      if (leaders[other] == leaders[rank]) members.push_back(static_cast<int>(other));
    }
  }
  groups_ = mesh.groups(colours);
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
  Bucket& bucket = weights_.buckets()[next_];
  device::SideStream::Mark& summed = summed_[next_++];
  const Communicator& group = groups_[bucket.group];
  if (group.size() == 1) return;
  beside_.run([&] { bucket.divided() ? group.reduce_into_own_part(bucket.gradients) : group.all_reduce(bucket.gradients); });
  summed = beside_.mark();
}

void Replicas::sum_gradients() {
  const TraceRange range("reduce");
  if (Postponed::waiting()) throw std::logic_error("gradients are summed before backward has ended");
  while (next_ < additions_.size()) launch_next();
  if (expected_.empty()) expected_ = additions_;
  if (additions_ != expected_) throw std::logic_error("this step added to some gradient more or less often than the first: its sum came too early");
  additions_.assign(additions_.size(), 0);
  next_ = 0;
}

void Replicas::wait_for_sum(size_t bucket) const {
  device::SideStream::wait(summed_[bucket], weights_.buckets()[bucket].gradients.device());
}

void Replicas::share_values(size_t index) {
  Bucket& bucket = weights_.buckets()[index];
  if (!bucket.divided()) return;
  beside_.run([&] { groups_[bucket.group].gather_from_own_part(bucket.values); });
  values_arrived_[index] = beside_.mark();
}

std::vector<std::string> Replicas::differences() {
  const Unrecorded guard;
  for (const Weight& weight : weights_.all()) weight.parameter.arrived();
  std::vector<std::string> lines;
  for (size_t index = 0; index < groups_.size(); ++index) {
    const Communicator& group = groups_[index];
    if (group.size() == 1) continue;
    std::vector<Tensor> sums;
    std::vector<std::string> names;
    for (const Bucket& bucket : weights_.buckets()) {
      if (bucket.group != index) continue;
      for (size_t i = 0; i < bucket.weights.size(); ++i) {
        const std::string name = name_of(weights_.all()[bucket.weights[i]]);
        sums.push_back(sum_of_bits(bucket.values, bucket.runs[i]));
        names.push_back(name);
        if (bucket.divided() || bucket.dtype == at::kFloat) continue;
        sums.push_back(sum_of_bits(bucket.masters, bucket.runs[i]));
        names.push_back(name + " (fp32 master)");
      }
    }
    if (sums.empty()) continue;
    const Tensor sum_W = at::stack(sums);
    Tensor least_W = sum_W.clone(), most_W = sum_W.clone();
    group.all_reduce(least_W, Reduce::min);
    group.all_reduce(most_W, Reduce::max);
    if (at::equal(least_W, most_W)) continue;
    const Tensor sum_RW = group.all_gather(sum_W.unsqueeze(0), 0).cpu();
    if (group.rank() != 0) continue;
    for (size_t w = 0; w < names.size(); ++w) {
      const Tensor sum_R = sum_RW.select(1, static_cast<int64_t>(w));
      if (sum_R.min().item<int64_t>() != sum_R.max().item<int64_t>()) lines.push_back(names[w] + ": " + parties(sum_R, members_[index]));
    }
  }
  return lines;
}

void Replicas::wait_for_values(size_t bucket) {
  if (const auto mark = std::exchange(values_arrived_[bucket], nullptr)) device::SideStream::wait(mark, weights_.buckets()[bucket].values.device());
}

}  // namespace upcycle
