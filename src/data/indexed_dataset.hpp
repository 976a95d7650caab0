#pragma once
#include <cstdint>
#include <span>
#include <string>

#include "base/mapped_file.hpp"

namespace upcycle {

/// Megatron's <prefix>.idx and <prefix>.bin, memory-mapped. A "sequence" of the format is called a document here.
/// Safe to use from several threads: nothing changes after construction.
class IndexedDataset {
 public:
  /// Reads the whole index, no token. Throws UserError naming file, field and numbers: a missing file, bad magic,
  /// version or dtype, counts that do not fit the file, negative lengths, offsets that do not follow from them, a
  /// document index that does not run from 0 to the number of documents, a .bin of another size.
  explicit IndexedDataset(const std::string& prefix);

  int64_t documents() const noexcept { return documents_; }
  int64_t tokens() const noexcept { return tokens_; }
  const std::string& prefix() const noexcept { return prefix_; }
  /// "int32": how a token is stored.
  const char* dtype() const noexcept;

  /// Tokens in `document`; 0 is possible. Precondition: 0 <= document < documents().
  int64_t length(int64_t document) const noexcept;
  /// Tokens in front of `document`; offset(documents()) == tokens(). Precondition: 0 <= document <= documents().
  int64_t offset(int64_t document) const noexcept;

  /// The document that token `token`, counted over all documents, is in. Precondition: 0 <= token < tokens().
  int64_t document_at(int64_t token) const noexcept;

  /// The format's code of the tokens' dtype: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 8 u16.
  int code() const noexcept { return code_; }
  /// All tokens as they are stored.
  std::span<const std::byte> stored() const noexcept { return data_.bytes(); }

  /// Tokens [begin, begin + out.size()) of `document` as int64. Throws std::out_of_range when the document has no such
  /// tokens.
  void read(int64_t document, int64_t begin, std::span<int64_t> out) const;

  /// Throws UserError naming file, document, position in it and id when a token is negative or >= vocab. Reads
  /// everything once.
  void check_tokens(int64_t vocab) const { check_tokens(vocab, 0, tokens_); }
  /// The same for tokens [begin, end), counted over all documents.
  void check_tokens(int64_t vocab, int64_t begin, int64_t end) const;

 private:
  const std::byte* field(int64_t begin, int64_t item, int64_t bytes) const noexcept;
  void check_header() const;
  void check_pointers() const;

  std::string prefix_;
  MappedFile index_, data_;
  int64_t documents_ = 0, tokens_ = 0;
  int64_t item_bytes_ = 0;
  uint8_t code_ = 0;
};

/// Throws the UserError of check_tokens: token `id` at `position` of `document` is outside of 0 .. vocab - 1.
[[noreturn]] void fail_token(const IndexedDataset&, int64_t document, int64_t position, int64_t id, int64_t vocab);

}  // namespace upcycle
