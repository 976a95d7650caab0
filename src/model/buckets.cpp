#include "model/buckets.hpp"

#include <algorithm>
#include <map>

namespace upcycle {
namespace {

// Weights begin at multiples of this many elements, as kernels want their matrices (16 bytes) and so that vectors of the optimizer
// end at the same elements whoever owns them.
constexpr int64_t kAlignment = 64;

int64_t round_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

}  // namespace

Range Bucket::owned(size_t i) const {
  const int64_t begin = std::max(own.begin, runs[i].begin), end = std::min(own.end, runs[i].end);
  return {begin, std::max(begin, end)};
}

std::vector<Bucket> plan_buckets(const std::vector<Stored>& weights, const std::vector<Place>& places, int64_t zero) {
  struct Open {
    size_t bucket;
    int64_t nominal;
  };
  std::vector<Bucket> buckets;
  std::map<std::pair<size_t, at::ScalarType>, Open> open;
  for (size_t index = weights.size(); index-- > 0;) {
    const Stored& weight = weights[index];
    const std::pair kind{weight.group, weight.dtype};
    auto at = open.find(kind);
    if (at == open.end() || at->second.nominal + weight.nominal > bucket_elements) {
      at = open.insert_or_assign(kind, Open{buckets.size(), 0}).first;
      Bucket& fresh = buckets.emplace_back();
      fresh.group = weight.group;
      fresh.place = places[weight.group];
      fresh.dtype = weight.dtype;
    }
    Bucket& bucket = buckets[at->second.bucket];
    bucket.weights.push_back(index);
    bucket.runs.push_back({bucket.size, bucket.size + weight.elements});
    bucket.size = round_up(bucket.size + weight.elements, kAlignment);
    at->second.nominal += weight.nominal;
  }
  // A bucket is complete when its last weight is.
  std::stable_sort(buckets.begin(), buckets.end(), [](const Bucket& a, const Bucket& b) {
    return std::pair(a.place.spans_stages, b.weights.back()) < std::pair(b.place.spans_stages, a.weights.back());
  });
  for (Bucket& bucket : buckets) {
    const auto [holders, index, spans] = bucket.place;
    if (zero > 0) bucket.size = round_up(bucket.size, holders * kAlignment);
    const int64_t part = zero > 0 ? bucket.size / holders : bucket.size;
    bucket.own.begin = zero > 0 ? index * part : 0;
    bucket.own.end = bucket.own.begin + part;
  }
  return buckets;
}

}  // namespace upcycle
