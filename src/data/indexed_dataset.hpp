#pragma once
#include <cstdint>
#include <span>
#include <string>

#include "base/mapped_file.hpp"

namespace upcycle {

/// Megatron's <prefix>.idx and <prefix>.bin, memory-mapped. A "sequence" of the format is called a document here.
class IndexedDataset {
 public:
  /// Throws UserError naming file, field and numbers: bad magic, version, dtype, counts or pointers past the end, lengths
  /// that are negative, offsets that do not follow from them.
  explicit IndexedDataset(const std::string& prefix);

  int64_t documents() const noexcept { return documents_; }
  int64_t length(int64_t document) const noexcept;
  int64_t tokens() const noexcept { return tokens_; }
  const std::string& prefix() const noexcept { return prefix_; }

  /// Tokens [begin, begin + out.size()) of `document` as int64.
  void read(int64_t document, int64_t begin, std::span<int64_t> out) const;

  /// Throws UserError naming prefix, document, position and id when a token is negative or >= vocab. Reads everything once.
  void check_tokens(int64_t vocab) const;

 private:
  std::string prefix_;
  MappedFile index_, data_;
  int64_t documents_ = 0, tokens_ = 0;
  int item_bytes_ = 0;
  uint8_t code_ = 0;
};

}  // namespace upcycle
