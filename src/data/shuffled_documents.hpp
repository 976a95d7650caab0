#pragma once
#include <mutex>
#include <vector>

#include "base/rng.hpp"
#include "data/indexed_dataset.hpp"
#include "data/permutation.hpp"
#include "data/source.hpp"

namespace upcycle {

/// A range of documents of an indexed data set, as samples. In every epoch anew: the documents are put in a random
/// order and read as one stream of tokens; a random few tokens (less than `sequence`) are left out in front; the rest
/// is cut into samples of sequence + 1 tokens, each beginning with the last token of the one before; the samples are
/// drawn in a random order. So every sample of an epoch comes once, and where sample i lies follows from (seed, i)
/// alone: no shuffled list is stored, only one number for every 32 documents of the epoch being read.
class ShuffledDocuments : public Source {
 public:
  /// Documents [begin, end) of `data`. `seed` and `name` decide the order. Throws UserError when they hold less than
  /// sequence + 1 tokens; `share` says in its message which part of the data that is ("validation share of split
  /// [99990, 8, 2]").
  ShuffledDocuments(IndexedDataset data, int64_t begin, int64_t end, int64_t sequence, int64_t vocab, uint64_t seed,
                    const std::string& name, const std::string& share);

  void sample(int64_t index, std::span<int64_t> out, std::span<int64_t> starts) const override;
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
  void read_stream(const Epoch&, int64_t begin, std::span<int64_t> out, std::span<int64_t> starts) const;

  IndexedDataset data_;
  int64_t begin_, end_, sequence_, vocab_, tokens_, samples_;
  Random document_keys_, sample_keys_, skip_;
  mutable std::mutex mutex_;
  mutable std::vector<Epoch> epoch_;  ///< the one read last, or none
};

}  // namespace upcycle
