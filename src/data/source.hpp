#pragma once
#include <cstdint>
#include <span>

// S tokens that a sample teaches to predict; it has S + 1.
namespace upcycle {

/// Room for one sample. A span that is empty is not wanted.
struct SampleRoom {
  std::span<int64_t> tokens;   ///< S + 1, each in 0 .. vocab - 1
  std::span<int64_t> starts;   ///< S: the place in the sample of the first token of token t's document; 0 for one that began before
  std::span<bool> learn;       ///< S: whether token t + 1, the label of token t, is learned
};

/// One data set of a blend, as an endless list of samples. Safe to use from several threads.
class Source {
 public:
  virtual ~Source() = default;

  /// Sample `index` >= 0. Throws UserError for what check() finds.
  virtual void sample(int64_t index, const SampleRoom& room) const = 0;
  /// Whether some tokens may be only read. Without a mask, `learn` is true everywhere.
  virtual bool masked() const noexcept { return false; }
  /// How many labels of sample `index` are learned; S without a mask.
  virtual int64_t learned(int64_t index) const = 0;
  /// Throws UserError when a token id is outside of the vocabulary, a value of the mask is neither 0 nor 1, or no token at all is
  /// learned. See Sampler::check.
  virtual void check(int64_t vocab) const = 0;

  /// Tokens and samples of one epoch; 0 and 0 when the list never repeats itself.
  virtual int64_t tokens() const noexcept = 0;
  virtual int64_t samples() const noexcept = 0;
};

}  // namespace upcycle
