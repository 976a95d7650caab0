#pragma once
#include "base/rng.hpp"
#include "data/source.hpp"

namespace upcycle {

/// Synthetic text without files: a Markov chain over at most 1024 states, spread over the vocabulary. From state s it
/// goes to (5 s + 7 + e) mod states with e uniform in 0 .. 3, so a perfect model has a loss of ln 4 = 1.386 per token
/// after the first, and one that knows nothing ln(vocab). The rule is the same for every seed; the numbers drawn are
/// not. A sample is one document.
class MockStream : public Source {
 public:
  MockStream(int64_t sequence, int64_t vocab, const Random& noise);

  void sample(int64_t index, const SampleRoom& room) const override;
  int64_t learned(int64_t) const override { return sequence_; }
  void check(int64_t) const override {}
  int64_t tokens() const noexcept override { return 0; }
  int64_t samples() const noexcept override { return 0; }

 private:
  int64_t sequence_, states_, spread_;
  Random noise_;
};

}  // namespace upcycle
