#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "data/indexed_dataset.hpp"

namespace upcycle {

/// Documents of length `from` to `to`.
struct LengthBucket {
  int64_t from, to;
  int64_t documents = 0;
  int64_t tokens = 0;
};

/// What is in token files. Lengths are those of all documents; what needs the tokens themselves is of `seen` of them.
struct DataSummary {
  int64_t documents = 0, tokens = 0, empty = 0;
  std::vector<LengthBucket> lengths;                      ///< 0, 1, 2 to 3, 4 to 7, ...: from the first to the last that is not empty
  std::vector<std::pair<int, int64_t>> quantiles;         ///< (percent of the documents, the most tokens that one of them has)
  int64_t seen = 0;                                       ///< tokens that were looked at
  int64_t smallest_id = 0, largest_id = 0;                ///< of these
  std::optional<double> learned;                          ///< share of these that the mask lets learn; empty without one
};

/// Reads all lengths, and all tokens, or, of more than `most`, as many in evenly spread pieces, first and last tokens among them. Memory
/// grows with the square root of the tokens at most. `mask`: an indexed data set with the same documents, not 0 where a token is learned.
/// Throws UserError when it has others.
DataSummary summarise(const IndexedDataset& data, const IndexedDataset* mask, int64_t most = int64_t{1} << 26);

/// "text.bin" and "text.idx" stand for "text", like "text" itself. Empty when there is no index of that name.
std::optional<std::string> data_prefix(const std::string& path);

}  // namespace upcycle
