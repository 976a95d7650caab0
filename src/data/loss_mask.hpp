#pragma once
#include <cstdint>
#include <optional>
#include <span>

#include "data/indexed_dataset.hpp"

namespace upcycle {

/// Which tokens of an indexed data set are learned, for supervised fine-tuning: <prefix>.mask.bin and .idx beside it, an indexed data
/// set of the same documents with one byte a token: 1 where the token is to be learned, which is where it is the label, and 0 where it
/// is only read. Safe to use from several threads.
class LossMask {
 public:
  /// The mask of `data`; nothing where it has none: then every token is learned. Reads the index, no mask byte. Throws UserError
  /// naming file and numbers: a .mask.bin without its index, another dtype than uint8, other documents than those of `data`, the first
  /// that differs; and all that IndexedDataset refuses.
  static std::optional<LossMask> beside(const IndexedDataset& data);

  /// Of tokens [begin, begin + out.size()) of `document`. Throws UserError naming the place of a value that is neither 0 nor 1.
  /// Precondition: the document has these tokens.
  void read(int64_t document, int64_t begin, std::span<bool> out) const;
  /// How many of tokens [begin, begin + size) of `document` are learned. The same precondition.
  int64_t learned(int64_t document, int64_t begin, int64_t size) const noexcept;

  /// Throws the UserError of read for tokens [begin, end), counted over all documents.
  void check(int64_t begin, int64_t end) const;
  /// Whether any of them is learned. Stops at the first.
  bool any(int64_t begin, int64_t end) const noexcept;

 private:
  explicit LossMask(IndexedDataset bytes) : bytes_(std::move(bytes)) {}
  [[noreturn]] void fail_value(int64_t token) const;

  IndexedDataset bytes_;
};

}  // namespace upcycle
