#pragma once
#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/tensor.hpp"
#include "config/run_config.hpp"

namespace upcycle {

/// Tokens and what to predict from them. `tokens`, `labels`: int64 [sequences, sequence]; labels are the next tokens, in the next
/// document after the last of one.
struct Batch {
  Tensor tokens_BS;
  Tensor labels_BS;
  Tensor starts_BS;   ///< int64, the place in its sequence of the first token of each token's document; undefined where borders don't matter
  Tensor learn_BS = {};   ///< bool, whether a label is learned; undefined where all are: no data set of the sampler has a loss mask
};

enum class Split { train, validation, test };

/// "train", "validation", "test".
const char* split_name(Split part);

/// The documents [first, second) of `part` when `documents` are shared out as `split` says, by Megatron's rule (shares
/// in float64, borders rounded half to even). Throws UserError on negative shares, or none above 0.
std::pair<int64_t, int64_t> documents_of(Split part, const std::array<int64_t, 3>& split, int64_t documents);

/// What the model is trained on, as a function: sample(i) is the i-th sequence of the stream, for every i >= 0, the
/// same for any number of ranks and any length of the run. It depends on (seed, data files, split, sequence) alone;
/// data sets count by their place in the blend, so files may move. Past the end of a data set its next epoch begins, in
/// another order. The position in the stream is a plain number, kept by the trainer and stored in checkpoints. Opening
/// reads the indices, not the tokens. Every rank may have one of its own; safe to use from several threads. A data set
/// with a loss mask beside it (loss_mask.hpp) is learned where its mask says so, one without as a whole; both may be in one blend.
class Sampler {
 public:
  /// `blend`: weights and prefixes; "mock" is a synthetic stream that a model can learn (mock_stream.hpp). `split`:
  /// shares of documents; data sets of which all is for one part, e.g. [data].validation, come with {0, 1, 0} and
  /// Split::validation. For mock data `part` and seed decide which samples of the same language come: {1, 0, 0} with
  /// Split::train would validate on what is trained on. Throws UserError when files or weights are wrong, or a part of
  /// the data is shorter than one sample. Batches tell where documents start when they are `packed`; a sample of mock data is one
  /// document.
  Sampler(const std::vector<Blend>& blend, const std::array<int64_t, 3>& split, Split part, int64_t sequence,
          int64_t vocab, uint64_t seed, Borders borders = Borders::concatenated);
  Sampler(Sampler&&) noexcept;
  ~Sampler();

  /// Samples first .. first + count - 1 on the CPU. Throws UserError naming file, document, position and id when one of
  /// their tokens is outside of 0 .. vocab - 1.
  Batch batch(int64_t first, int64_t count) const;

  /// Whether some data set has a loss mask.
  bool masked() const noexcept;
  /// Labels that are learned in samples first .. first + count - 1, wherever they are read: what a mean over them is divided by.
  /// Reads their masks; without masks nothing.
  int64_t learned(int64_t first, int64_t count) const;

  /// Throws the same error before anything is trained, and others for masks (Source::check). Reads this part of every data set once when it has less than 2e9
  /// tokens, else 256 evenly spread pieces of it, first and last tokens among them (batch() looks at every token it
  /// returns). One rank is enough.
  void check(int64_t vocab) const;

  /// Tokens of one pass over this part of all data sets, and samples in them. Mock data adds 0: it never repeats
  /// itself.
  int64_t tokens() const noexcept;
  int64_t samples() const noexcept;

  /// A data set of the blend.
  struct DataSet {
    std::string prefix;
    double share;      ///< of the stream's samples
    int64_t samples;   ///< of one pass over this part of it; 0: mock data
    bool masked;       ///< it has a loss mask
  };
  std::vector<DataSet> data_sets() const;
  /// How many of the stream's first `count` samples are of data set `place` of the blend. Exact.
  int64_t drawn(size_t place, int64_t count) const;
  /// The largest number of samples, at most `count`, in which no data set is passed more than `epochs` times.
  int64_t within(double epochs, int64_t count) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace upcycle
