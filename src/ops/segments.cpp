#include "ops/segments.hpp"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <stdexcept>

#include "base/error.hpp"
#include "device/device.hpp"

namespace upcycle {
namespace {

void check(const std::vector<Segment>& segments, int64_t queries, int64_t keys) {
  int64_t next = 0;
  for (const Segment& s : segments) {
    if (s.q_begin != next || s.queries() < 1 || s.keys() < s.queries() || s.k_begin < 0 || s.k_end > keys) {
      throw std::logic_error(text("segment of queries ", s.q_begin, " to ", s.q_end, " on keys ", s.k_begin, " to ", s.k_end,
                                  ", where query ", next, " comes next and there are ", keys, " keys"));
    }
    next = s.q_end;
  }
  if (next != queries) throw std::logic_error(text("segments cover ", next, " of ", queries, " queries"));
}

}  // namespace

Segments::Segments(std::vector<std::vector<Segment>> of_sequence, int64_t sequences, int64_t queries, int64_t keys,
                   c10::Device device, bool recurring)
    : of_sequence_(std::move(of_sequence)), sequences_(sequences), keys_(keys), recurring_(recurring) {
  const auto lists = static_cast<int64_t>(of_sequence_.size());
  if (lists != 1 && (lists == 0 || lists != sequences)) {
    throw std::logic_error(text(lists, " lists of segments for ", sequences, " sequences"));
  }
  for (const std::vector<Segment>& segments : of_sequence_) check(segments, queries, keys);

  std::vector<int32_t> q_ends = {0}, k_ends = {0};
  for (int64_t b = 0; b < sequences; ++b) {
    for (const Segment& s : of_sequence_[lists == 1 ? 0 : b]) {
      q_ends.push_back(q_ends.back() + static_cast<int32_t>(s.queries()));
      k_ends.push_back(k_ends.back() + static_cast<int32_t>(s.keys()));
      rows_.longest_q = std::max(rows_.longest_q, s.queries());
      rows_.longest_k = std::max(rows_.longest_k, s.keys());
      const int64_t begin = b * keys + s.k_begin, end = b * keys + s.k_end;
      if (!rows_.keys.empty() && rows_.keys.back().second == begin) {
        rows_.keys.back().second = end;
      } else {
        rows_.keys.emplace_back(begin, end);
      }
    }
  }
  const auto sent = [&](const std::vector<int32_t>& ends) {
    const Tensor host = at::empty({static_cast<int64_t>(ends.size())}, at::kInt);
    std::copy(ends.begin(), ends.end(), host.mutable_data_ptr<int32_t>());
    return device::send(host, device);
  };
  rows_.q_ends = sent(q_ends);
  rows_.k_ends = sent(k_ends);
}

bool Segments::keys_in_place() const noexcept {
  return rows_.keys.size() == 1 && rows_.keys[0].first == 0 && rows_.keys[0].second == sequences_ * keys_;
}

}  // namespace upcycle
