#include "data/blend_schedule.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <queue>
#include <utility>

#include "base/error.hpp"

// w weights with sum 1, M places in the cycle, c places of one data set, j of its samples, t places
namespace upcycle {
namespace {

constexpr int64_t kLongest = 1 << 20;         // of the cycles that are looked for
constexpr int64_t kPlacesOfBlock = 1 << 16;   // places that are worked out at once

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

/// Places of each data set in a cycle of M; empty when M does not have the weights. float64 knows a weight to 1e-16 of the sum; a
/// thousand of them add up to this.
std::vector<int64_t> exact_places(const std::vector<double>& w, int64_t M) {
  std::vector<int64_t> c;
  for (const double weight : w) {
    const double share = weight * static_cast<double>(M);
    if (std::abs(share - std::round(share)) > 1e-14 * static_cast<double>(M) || share < 0.5) return {};
    c.push_back(std::llround(share));
  }
  return std::accumulate(c.begin(), c.end(), int64_t{0}) == M ? c : std::vector<int64_t>{};
}

std::vector<int64_t> places_of(const std::vector<Blend>& blend) {
  const std::vector<double> w = normalised(blend);
  for (int64_t M = 1; M <= kLongest; ++M) {
    if (std::vector<int64_t> c = exact_places(w, M); !c.empty()) return c;
  }
  std::vector<int64_t> c;
  for (size_t d = 0; d < w.size(); ++d) {
    c.push_back(std::llround(std::ldexp(w[d], 61)));   // exact: of 53 bits
    if (c.back() == 0) fail("data set ", blend[d].prefix, ": weight ", blend[d].weight, " is nothing beside the others; leave it out");
  }
  return c;
}

/// The samples of one data set that are still to come: when the next may come, and must.
class Windows {
 public:
  /// The next one is sample j. M places, c of this data set.
  Windows(int64_t M, int64_t c, int64_t j) : step_(M / c), step_rest_(M % c), c_(c) {
    const auto begin = static_cast<__int128>(j) * M;
    release_ = static_cast<int64_t>(begin / c);
    rest_ = static_cast<int64_t>(begin % c);
    set_end();
  }
  int64_t release() const { return release_; }                         // floor(j*M/c)
  int64_t deadline() const { return end_ + (end_rest_ > 0 ? 1 : 0); }  // ceil((j+1)*M/c)
  void next() {
    release_ = end_, rest_ = end_rest_;
    set_end();
  }

 private:
  void set_end() {
    end_ = release_ + step_, end_rest_ = rest_ + step_rest_;
    if (end_rest_ >= c_) ++end_, end_rest_ -= c_;
  }
  int64_t step_, step_rest_, c_;
  int64_t release_, rest_, end_, end_rest_;   // j*M = release*c + rest, (j+1)*M = end*c + end_rest
};

/// (time, data set), the earliest first; at the same time the data set named first.
using Earliest = std::priority_queue<std::pair<int64_t, int32_t>, std::vector<std::pair<int64_t, int32_t>>, std::greater<>>;

}  // namespace

BlendSchedule::BlendSchedule(const std::vector<Blend>& blend)
    : places_(places_of(blend)), period_(std::accumulate(places_.begin(), places_.end(), int64_t{0})), drawn_(1, std::vector<int64_t>(blend.size(), 0)) {}

BlendSchedule::Block BlendSchedule::work_out(int64_t number) const {
  const std::vector<int64_t>& before = drawn_.at(static_cast<size_t>(number));
  std::vector<Windows> windows;
  std::vector<int64_t> drawn = before;
  Earliest waiting, ready;   // by release; by deadline
  for (size_t d = 0; d < places_.size(); ++d) {
    windows.emplace_back(period_, places_[d], before[d]);
    waiting.emplace(windows[d].release(), static_cast<int32_t>(d));
  }
  Block block{number, {}};
  const int64_t begin = number * kPlacesOfBlock, end = begin + std::min(kPlacesOfBlock, period_ - begin);
  block.places.reserve(static_cast<size_t>(end - begin));
  for (int64_t t = begin; t < end; ++t) {
    while (!waiting.empty() && waiting.top().first <= t) {
      const int32_t d = waiting.top().second;
      waiting.pop();
      ready.emplace(windows[d].deadline(), d);
    }
    const int32_t d = ready.top().second;
    ready.pop();
    block.places.push_back({d, static_cast<int32_t>(drawn[d]++ - before[d])});
    windows[d].next();
    waiting.emplace(windows[d].release(), d);
  }
  if (static_cast<int64_t>(drawn_.size()) == number + 1) drawn_.push_back(std::move(drawn));   // `before` is not read any more
  return block;
}

const BlendSchedule::Block& BlendSchedule::block(int64_t number) const {
  if (recent_[0].number == number) return recent_[0];
  std::swap(recent_[0], recent_[1]);
  if (recent_[0].number == number) return recent_[0];
  while (static_cast<int64_t>(drawn_.size()) <= number) work_out(static_cast<int64_t>(drawn_.size()) - 1);
  return recent_[0] = work_out(number);
}

BlendSchedule::Pick BlendSchedule::at(int64_t position) const {
  const std::lock_guard lock(mutex_);
  const int64_t cycle = position / period_, place = position % period_, number = place / kPlacesOfBlock;
  const auto [dataset, sample] = block(number).places[place % kPlacesOfBlock];
  return {dataset, cycle * places_[dataset] + drawn_[number][dataset] + sample};
}

int64_t BlendSchedule::drawn(int64_t dataset, int64_t n) const {
  const std::lock_guard lock(mutex_);
  const int64_t cycle = n / period_, place = n % period_, number = place / kPlacesOfBlock;
  const std::vector<Place>& places = block(number).places;
  const auto in_block = std::count_if(places.begin(), places.begin() + place % kPlacesOfBlock, [&](const Place& p) { return p.dataset == dataset; });
  return cycle * places_[dataset] + drawn_[number][dataset] + in_block;
}

int64_t BlendSchedule::most(int64_t dataset, int64_t n) const {
  return static_cast<int64_t>((static_cast<__int128>(n) * places_[dataset] + period_ - 1) / period_);
}

int64_t BlendSchedule::position_of(int64_t dataset, int64_t sample) const {
  const std::lock_guard lock(mutex_);
  const int64_t cycle = sample / places_[dataset], j = sample % places_[dataset];
  for (int64_t number = Windows(period_, places_[dataset], j).release() / kPlacesOfBlock;; ++number) {
    const std::vector<Place>& places = block(number).places;
    const Place wanted{static_cast<int32_t>(dataset), static_cast<int32_t>(j - drawn_[number][dataset])};
    const auto found = std::find(places.begin(), places.end(), wanted);
    if (found != places.end()) return cycle * period_ + number * kPlacesOfBlock + (found - places.begin());
  }
}

}  // namespace upcycle
