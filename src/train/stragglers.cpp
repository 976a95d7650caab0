#include "train/stragglers.hpp"

#include <algorithm>
#include <stdexcept>

namespace upcycle {

void Stragglers::add(const std::vector<double>& seconds) {
  if (seconds.empty()) return;
  if (seconds.size() != hosts_.size()) throw std::logic_error("seconds of other ranks than there are");
  for (size_t rank = 0; rank < seconds.size(); ++rank) {
    if (seconds[rank] > 0) sums_[rank] += seconds[rank], ++steps_[rank];
  }
}

std::optional<Stragglers::Slowest> Stragglers::take() {
  std::vector<double> means;
  for (size_t rank = 0; rank < hosts_.size() && steps_[rank] > 0; ++rank) means.push_back(sums_[rank] / steps_[rank]);
  std::fill(sums_.begin(), sums_.end(), 0.0);
  std::fill(steps_.begin(), steps_.end(), 0);
  if (means.size() < hosts_.size() || means.size() < 2) return std::nullopt;
  std::vector<double> sorted = means;
  std::sort(sorted.begin(), sorted.end());
  const size_t half = sorted.size() / 2;
  const double median = sorted.size() % 2 == 1 ? sorted[half] : (sorted[half - 1] + sorted[half]) / 2;
  const auto rank = static_cast<size_t>(std::max_element(means.begin(), means.end()) - means.begin());
  return Slowest{static_cast<int>(rank), hosts_[rank], means[rank], means[rank] / median, means};
}

}  // namespace upcycle
