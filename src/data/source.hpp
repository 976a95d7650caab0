#pragma once
#include <cstdint>
#include <span>

namespace upcycle {

/// One data set of a blend, as an endless list of samples. Safe to use from several threads.
class Source {
 public:
  virtual ~Source() = default;

  /// Sample `index` >= 0: out.size() = sequence + 1 tokens, each in 0 .. vocab - 1. starts[t], for the first starts.size() <=
  /// out.size() of them: the place in the sample of the first token of token t's document; 0 for one that began before.
  virtual void sample(int64_t index, std::span<int64_t> out, std::span<int64_t> starts) const = 0;
  /// Throws UserError when a token id is outside of the vocabulary. See Sampler::check.
  virtual void check(int64_t vocab) const = 0;

  /// Tokens and samples of one epoch; 0 and 0 when the list never repeats itself.
  virtual int64_t tokens() const noexcept = 0;
  virtual int64_t samples() const noexcept = 0;
};

}  // namespace upcycle
