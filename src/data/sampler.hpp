#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/tensor.hpp"
#include "config/run_config.hpp"

namespace upcycle {

/// Tokens and what to predict from them. `tokens`, `labels`: int64 [sequences, sequence]; labels are the next tokens.
struct Batch {
  Tensor tokens_BS;
  Tensor labels_BS;
};

enum class Split { train, validation, test };

/// What the model is trained on, as a function: sample(i) is the i-th sequence of the stream, for every i >= 0, the same for any
/// number of ranks and any length of the run. It depends on (seed, data files, split, sequence) alone.
/// The position in the stream is a plain number, kept by the trainer and stored in checkpoints.
class Sampler {
 public:
  /// `blend`: weights and prefixes; "mock" is a synthetic stream that a model can learn. `split`: shares of documents.
  /// Throws UserError when files are wrong, a split holds less than one sequence, or a token id >= vocab.
  Sampler(const std::vector<Blend>& blend, const std::array<int64_t, 3>& split, Split part, int64_t sequence, int64_t vocab,
          uint64_t seed);
  Sampler(Sampler&&) noexcept;
  ~Sampler();

  /// Samples first .. first + count - 1 on the CPU.
  Batch batch(int64_t first, int64_t count) const;

  /// Tokens of one pass over this part of the data, and samples in it.
  int64_t tokens() const noexcept;
  int64_t samples() const noexcept;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace upcycle
