#pragma once
#include <c10/core/Device.h>

#include <utility>
#include <vector>

#include "base/tensor.hpp"

// Shapes: B sequences, S queries and P keys of a sequence.
namespace upcycle {

/// Neighbouring queries of one sequence that see a range of its keys, causally and aligned at the end: the last query sees all of
/// [k_begin, k_end), the one before it all but the last key, and so on. So keys are at least as many as queries.
struct Segment {
  int64_t q_begin, q_end, k_begin, k_end;
  int64_t queries() const noexcept { return q_end - q_begin; }
  int64_t keys() const noexcept { return k_end - k_begin; }
  bool operator==(const Segment&) const = default;
};

/// Which keys the queries of a batch see. Segments of different sequences, or of one, may see the same keys or leave some out.
class Segments {
 public:
  /// Plain causal attention: query i of every sequence sees keys 0 .. i.
  Segments() = default;
  /// For each of B sequences its segments, which cover queries 0 .. S-1 in order; one list alone serves all sequences. `device` is
  /// where attention will run. `recurring`: further batches have segments of the same lengths, so that kernels may plan for them.
  /// Throws std::logic_error when queries are left out or keys lie outside of 0 .. P-1.
  Segments(std::vector<std::vector<Segment>> of_sequence, int64_t sequences, int64_t queries, int64_t keys, c10::Device device,
           bool recurring = false);

  bool plain() const noexcept { return of_sequence_.empty(); }
  bool recurring() const noexcept { return recurring_; }

  /// visit(first sequence, number of sequences, segment): all sequences at once where they are alike. Not for plain ones.
  template <class Visit>
  void for_each(const Visit& visit) const {
    const bool alike = of_sequence_.size() == 1;
    for (size_t b = 0; b < of_sequence_.size(); ++b) {
      for (const Segment& segment : of_sequence_[b]) visit(static_cast<int64_t>(b), alike ? sequences_ : 1, segment);
    }
  }

  /// The same for kernels that take segments of different lengths one after another, over the rows of all sequences.
  struct Rows {
    Tensor q_ends, k_ends;    ///< int32 [segments + 1] on the device, from 0: where each segment's rows end
    int64_t longest_q = 0, longest_k = 0;
    std::vector<std::pair<int64_t, int64_t>> keys;   ///< ranges of the B*P key rows which, one after another, are all segments' keys
  };
  const Rows& rows() const noexcept { return rows_; }
  /// True where the segments' keys are the key rows as they lie: nothing has to be gathered.
  bool keys_in_place() const noexcept;

 private:
  std::vector<std::vector<Segment>> of_sequence_;
  int64_t sequences_ = 0, keys_ = 0;
  bool recurring_ = false;
  Rows rows_;
};

}  // namespace upcycle
