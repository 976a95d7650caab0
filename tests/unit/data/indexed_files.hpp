#pragma once
#include <gtest/gtest.h>

#include <cstring>
#include <string>
#include <vector>

#include "support/scratch.hpp"

namespace upcycle {

using Documents = std::vector<std::vector<int64_t>>;

/// What a message must say.
inline void has(const std::string& message, const std::string& part) {
  EXPECT_NE(message.find(part), std::string::npos) << "message: " << message << "\nlacks:   " << part;
}

template <class T>
void append(std::string& bytes, T value) {
  bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
}

/// An index with every field open to be spoiled. Megatron's layout, written down here once more.
struct Index {
  std::string magic = std::string("MMIDIDX\0\0", 9);
  uint64_t version = 1;
  uint8_t code = 4;
  uint64_t sequences = 0, entries = 0;  ///< as the header says them
  std::vector<int32_t> lengths;
  std::vector<int64_t> offsets, documents;
  std::string rest;

  std::string bytes() const {
    std::string out = magic;
    append(out, version);
    append(out, code);
    append(out, sequences);
    append(out, entries);
    for (const int32_t length : lengths) append(out, length);
    for (const int64_t offset : offsets) append(out, offset);
    for (const int64_t document : documents) append(out, document);
    return out + rest;
  }
};

template <class T>
std::string tokens_as(const Documents& documents) {
  std::string bytes;
  for (const auto& document : documents) {
    for (const int64_t token : document) append(bytes, static_cast<T>(token));
  }
  return bytes;
}

inline Index index_of(const Documents& documents, uint8_t code = 4, int64_t item_bytes = 4) {
  Index index;
  index.code = code;
  index.sequences = documents.size();
  index.entries = documents.size() + 1;
  int64_t offset = 0;
  index.documents.push_back(0);
  for (const auto& document : documents) {
    index.lengths.push_back(static_cast<int32_t>(document.size()));
    index.offsets.push_back(offset);
    offset += static_cast<int64_t>(document.size()) * item_bytes;
    index.documents.push_back(static_cast<int64_t>(index.documents.size()));
  }
  return index;
}

/// Writes <folder>/<name>.bin and .idx (i32) and returns the prefix.
inline std::string write_documents(const Scratch& folder, const Documents& documents,
                                   const std::string& name = "text") {
  store(folder / (name + ".bin"), tokens_as<int32_t>(documents));
  store(folder / (name + ".idx"), index_of(documents).bytes());
  return (folder / name).string();
}

/// Writes <folder>/<name>.mask.bin and .idx, one byte for every token.
inline void write_mask(const Scratch& folder, const Documents& mask, const std::string& name = "text") {
  store(folder / (name + ".mask.bin"), tokens_as<uint8_t>(mask));
  store(folder / (name + ".mask.idx"), index_of(mask, 1, 1).bytes());
}

/// 1 where learned(token).
template <class Learned>
Documents mask_of(Documents documents, Learned&& learned) {
  for (auto& document : documents) {
    for (int64_t& token : document) token = learned(token) ? 1 : 0;
  }
  return documents;
}

/// `count` documents of lengths 0, 7, 14, ..., cut at 40, whose tokens are numbered through from `first`: a token names
/// its place.
inline Documents numbered(int64_t count, int64_t first = 0) {
  Documents documents(count);
  for (int64_t d = 0; d < count; ++d) {
    for (int64_t t = 0; t < 7 * d % 41; ++t) documents[d].push_back(first++);
  }
  return documents;
}

inline int64_t tokens_in(const Documents& documents) {
  int64_t tokens = 0;
  for (const auto& document : documents) tokens += static_cast<int64_t>(document.size());
  return tokens;
}

}  // namespace upcycle
