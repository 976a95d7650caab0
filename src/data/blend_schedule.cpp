#include "data/blend_schedule.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "base/error.hpp"

// w weights with sum 1, M places in the cycle, c places of one data set
namespace upcycle {
namespace {

constexpr int64_t kLongest = 1 << 20;

std::vector<double> normalised(const std::vector<Blend>& blend) {
  if (blend.empty()) fail("a blend of no data sets: [data].train = [[1.0, \"prefix of .bin and .idx\"]], or \"mock\"");
  double sum = 0;
  for (const Blend& part : blend) {
    if (!std::isfinite(part.weight) || part.weight <= 0) {
      fail("data set ", part.prefix, " has weight ", part.weight,
           "; weights are positive numbers, leave the data set out instead");
    }
    sum += part.weight;
  }
  std::vector<double> w;
  for (const Blend& part : blend) w.push_back(part.weight / sum);
  return w;
}

/// Places of each data set in a cycle of M; empty when M does not have the weights to 1e-9.
std::vector<int64_t> exact_places(const std::vector<double>& w, int64_t M) {
  std::vector<int64_t> c;
  for (const double weight : w) {
    const double share = weight * static_cast<double>(M);
    if (std::abs(share - std::round(share)) > 1e-9 * static_cast<double>(M) || share < 0.5) return {};
    c.push_back(std::llround(share));
  }
  return std::accumulate(c.begin(), c.end(), int64_t{0}) == M ? c : std::vector<int64_t>{};
}

/// Rounded down, the places left go to the largest remainders, first come first served.
std::vector<int64_t> rounded_places(const std::vector<double>& w, int64_t M) {
  std::vector<int64_t> c, order(w.size());
  std::vector<double> remainder;
  for (const double weight : w) {
    const double share = weight * static_cast<double>(M);
    c.push_back(static_cast<int64_t>(share));
    remainder.push_back(share - std::floor(share));
  }
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return remainder[x] > remainder[y]; });
  const int64_t left = M - std::accumulate(c.begin(), c.end(), int64_t{0});
  for (int64_t i = 0; i < left; ++i) ++c[order[i % order.size()]];
  return c;
}

std::vector<int64_t> places_of(const std::vector<double>& w) {
  for (int64_t M = 1; M <= kLongest; ++M) {
    if (std::vector<int64_t> c = exact_places(w, M); !c.empty()) return c;
  }
  return rounded_places(w, kLongest);
}

}  // namespace

BlendSchedule::BlendSchedule(const std::vector<Blend>& blend) : places_(places_of(normalised(blend))) {
  for (size_t d = 0; d < blend.size(); ++d) {
    if (places_[d] == 0) {
      fail("data set ", blend[d].prefix, ": weight ", blend[d].weight, " is less than one sample in ", kLongest,
           "; leave it out or raise its weight");
    }
  }
  const int64_t M = std::accumulate(places_.begin(), places_.end(), int64_t{0});
  std::vector<int64_t> drawn(blend.size(), 0), release(blend.size(), 0), deadline;
  for (const int64_t c : places_) deadline.push_back((M + c - 1) / c);
  cycle_.reserve(M);
  for (int64_t t = 0; t < M; ++t) {
    int64_t next = -1;
    for (size_t d = 0; d < blend.size(); ++d) {
      if (release[d] <= t && (next < 0 || deadline[d] < deadline[next])) next = static_cast<int64_t>(d);
    }
    cycle_.push_back({static_cast<int32_t>(next), static_cast<int32_t>(drawn[next])});
    const int64_t c = places_[next], j = ++drawn[next];
    release[next] = j * M / c;
    deadline[next] = ((j + 1) * M + c - 1) / c;
  }
}

BlendSchedule::Pick BlendSchedule::at(int64_t position) const noexcept {
  const Place place = cycle_[position % period()];
  return {place.dataset, position / period() * places_[place.dataset] + place.sample};
}

}  // namespace upcycle
