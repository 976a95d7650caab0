#include "model/positions.hpp"

#include <algorithm>

namespace upcycle {

std::vector<Segment> segments_of(const std::vector<Stretch>& held, const int64_t* starts) {
  std::vector<Segment> segments;
  int64_t row = 0;   // of the next query
  for (const Stretch& stretch : held) {
    for (int64_t position = stretch.begin; position < stretch.end; ++position, ++row) {
      const int64_t document = starts != nullptr ? starts[row] : 0;
      if (position > stretch.begin && segments.back().k_begin == document) {
        ++segments.back().q_end, ++segments.back().k_end;
      } else {
        segments.push_back({row, row + 1, document, position + 1});
      }
    }
  }
  return segments;
}

Segments segments_of(int64_t sequences, int64_t length, const std::vector<Stretch>& held, const Tensor& starts_BC,
                     at::Device device) {
  int64_t queries = 0;
  for (const Stretch& stretch : held) queries += stretch.size();
  const Tensor starts = starts_BC.defined() ? starts_BC.contiguous() : starts_BC;
  std::vector<std::vector<Segment>> of_sequence;
  for (int64_t b = 0; b < (starts.defined() ? sequences : 1); ++b) {
    of_sequence.push_back(segments_of(held, starts.defined() ? starts.const_data_ptr<int64_t>() + b * queries : nullptr));
  }
  const std::vector<Segment> all_causal = {{0, length, 0, length}};
  if (std::all_of(of_sequence.begin(), of_sequence.end(), [&](const auto& segments) { return segments == all_causal; })) return {};
  return {std::move(of_sequence), sequences, queries, length, device, /*recurring=*/!starts.defined()};
}

}  // namespace upcycle
