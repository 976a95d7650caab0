#include "data/mock_stream.hpp"

#include <algorithm>

namespace upcycle {

MockStream::MockStream(int64_t sequence, int64_t vocab, const Random& noise)
    : sequence_(sequence), states_(std::min<int64_t>(vocab, 1024)), spread_(vocab / states_), noise_(noise) {}

void MockStream::sample(int64_t index, const SampleRoom& room) const {
  std::fill(room.starts.begin(), room.starts.end(), 0);
  std::fill(room.learn.begin(), room.learn.end(), true);
  const std::span<int64_t> out = room.tokens;
  const uint64_t first = static_cast<uint64_t>(index) * out.size();
  auto state = static_cast<int64_t>(noise_.below(states_, first));
  for (size_t t = 0; t < out.size(); ++t) {
    if (t > 0) state = (5 * state + 7 + static_cast<int64_t>(noise_.below(4, first + t))) % states_;
    out[t] = state * spread_;
  }
}

}  // namespace upcycle
