#pragma once
#include <mutex>
#include <vector>

#include "base/rng.hpp"
#include "data/indexed_dataset.hpp"
#include "data/loss_mask.hpp"
#include "data/permutation.hpp"
#include "data/source.hpp"

namespace upcycle {

/// A range of documents of an indexed data set, as samples. In every epoch anew: the documents are put in a random
/// order and read as one stream of tokens; a random few tokens (less than `sequence`) are left out in front; the rest
/// is cut into samples of sequence + 1 tokens, each beginning with the last token of the one before; the samples are
/// drawn in a random order. So every sample of an epoch comes once, and where sample i lies follows from (seed, i)
/// alone: no shuffled list is stored, only one number for every 32 documents of the epochs being read. A loss mask beside the data set
/// says which of its tokens are learned.
class ShuffledDocuments : public Source {
 public:
  /// Documents [begin, end) of `data`. `seed` and `name` decide the order. Throws UserError when they hold less than
  /// sequence + 1 tokens, and for a mask that is not of `data`; `share` says in its message which part of the data that is ("validation share of split
  /// [99990, 8, 2]").
  ShuffledDocuments(IndexedDataset data, int64_t begin, int64_t end, int64_t sequence, int64_t vocab, uint64_t seed,
                    const std::string& name, const std::string& share);

  void sample(int64_t index, const SampleRoom& room) const override;
  bool masked() const noexcept override { return mask_.has_value(); }
  int64_t learned(int64_t index) const override;
  void check(int64_t vocab) const override;
  int64_t tokens() const noexcept override { return tokens_; }
  int64_t samples() const noexcept override { return samples_; }

 private:
  /// One epoch's order: permuted document number i is document begin_ + documents(i); block_begin[k] tokens lie in
  /// front of number 32 k.
  struct Epoch {
    int64_t number;
    Permutation documents, samples;
    int64_t skipped;  ///< tokens left out in front
    std::vector<int64_t> block_begin;
  };
  Epoch order(int64_t epoch) const;
  /// Calls visit(epoch, where in its stream the sample begins) for sample `index`, under the lock.
  template <class Visit>
  void at_sample(int64_t index, Visit&& visit) const;
  /// Calls visit(document, position in it, tokens) for every stretch of a document among `count` tokens of the stream from `begin` on.
  template <class Visit>
  void for_each_stretch(const Epoch&, int64_t begin, int64_t count, Visit&& visit) const;

  IndexedDataset data_;
  std::optional<LossMask> mask_;
  std::string share_;
  int64_t begin_, end_, sequence_, vocab_, tokens_, samples_;
  Random document_keys_, sample_keys_, skip_;
  mutable std::mutex mutex_;
  mutable std::vector<Epoch> epochs_;  ///< the last ones, at most two: a step's batch may lie in both
};

}  // namespace upcycle
