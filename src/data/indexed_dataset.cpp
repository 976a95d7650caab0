#include "data/indexed_dataset.hpp"

#include <algorithm>
#include <bit>
#include <cstring>
#include <filesystem>
#include <stdexcept>

#include "base/error.hpp"

// <prefix>.idx, little endian:
//   0 "MMIDIDX" 00 00 | 9 u64 version 1 | 17 u8 dtype code | 18 u64 Q documents | 26 u64 D entries of the document
//   index 34 i32[Q] length in tokens | i64[Q] byte offset in .bin | i64[D] document index | optionally i8[Q] modes
namespace upcycle {
namespace {

static_assert(std::endian::native == std::endian::little, "Megatron's files are little endian");

constexpr int64_t kHeaderBytes = 34;
constexpr char kMagic[9] = {'M', 'M', 'I', 'D', 'I', 'D', 'X', 0, 0};
constexpr const char* kMakeAgain = "; write the data set again";

template <class T>
T load(const std::byte* from) noexcept {
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

/// Calls action(T{}) with the integer type of a dtype code; false for codes that hold no tokens.
template <class Action>
bool with_type(uint8_t code, Action&& action) {
  switch (code) {
    case 1:
      return action(uint8_t{}), true;
    case 2:
      return action(int8_t{}), true;
    case 3:
      return action(int16_t{}), true;
    case 4:
      return action(int32_t{}), true;
    case 5:
      return action(int64_t{}), true;
    case 8:
      return action(uint16_t{}), true;
    default:
      return false;
  }
}

MappedFile open(const std::string& prefix, const char* ending) {
  const std::string path = prefix + ending;
  if (!std::filesystem::exists(path)) {
    fail(path, ": no such file ([data] wants what Megatron's .bin and .idx have in common: \"", prefix,
         "\" stands for ", prefix, ".bin and ", prefix, ".idx)");
  }
  return MappedFile(path);
}

}  // namespace

IndexedDataset::IndexedDataset(const std::string& prefix)
    : prefix_(prefix), index_(open(prefix, ".idx")), data_(open(prefix, ".bin")) {
  check_header();
  const std::byte* header = index_.bytes().data();
  code_ = load<uint8_t>(header + 17);
  with_type(code_, [&](auto item) { item_bytes_ = sizeof(item); });
  documents_ = load<int64_t>(header + 18);
  check_pointers();
  tokens_ = static_cast<int64_t>(data_.bytes().size()) / item_bytes_;
}

const char* IndexedDataset::dtype() const noexcept {
  static const char* const kNames[] = {"", "uint8", "int8", "int16", "int32", "int64", "", "", "uint16"};
  return kNames[code_];
}

const std::byte* IndexedDataset::field(int64_t begin, int64_t item, int64_t bytes) const noexcept {
  return index_.bytes().data() + kHeaderBytes + begin + item * bytes;
}

int64_t IndexedDataset::length(int64_t document) const noexcept { return load<int32_t>(field(0, document, 4)); }

int64_t IndexedDataset::offset(int64_t document) const noexcept {
  if (document == documents_) return tokens_;
  return load<int64_t>(field(4 * documents_, document, 8)) / item_bytes_;
}

// The last document that begins at or before the token; empty ones begin where the next one does.
int64_t IndexedDataset::document_at(int64_t token) const noexcept {
  int64_t document = 0;
  for (int64_t above = documents_; above - document > 1;) {
    const int64_t middle = document + (above - document) / 2;
    (offset(middle) <= token ? document : above) = middle;
  }
  return document;
}

void IndexedDataset::check_header() const {
  const std::string file = index_.path().string();
  const std::span<const std::byte> bytes = index_.bytes();
  const auto size = static_cast<uint64_t>(bytes.size());
  if (size < kHeaderBytes) fail(file, ": ", size, " bytes, but the header alone has ", kHeaderBytes, kMakeAgain);
  if (std::memcmp(bytes.data(), kMagic, sizeof kMagic) != 0) {
    fail(file, ": does not begin with MMIDIDX: not an index of Megatron's indexed data sets");
  }
  const auto version = load<uint64_t>(bytes.data() + 9);
  if (version != 1) fail(file, ": version ", version, ", but only version 1 is read");
  const auto code = load<uint8_t>(bytes.data() + 17);
  if (!with_type(code, [](auto) {})) {
    fail(file, ": dtype code ", int{code}, code == 6 || code == 7 ? " (floating point)" : "",
         ", but tokens are integers: 1 u8, 2 i8, 3 i16, 4 i32, 5 i64, 8 u16");
  }
  const auto documents = load<uint64_t>(bytes.data() + 18);
  const auto entries = load<uint64_t>(bytes.data() + 26);
  const uint64_t room = size - kHeaderBytes;
  // Divisions first: a count near 2^64 would wrap round in the product.
  if (documents > room / 12 || entries > room / 8 || 12 * documents + 8 * entries > room) {
    fail(file, ": ", documents, " sequences and ", entries, " entries of the document index need more than the file's ",
         size, " bytes: the header is wrong or the file was cut off", kMakeAgain);
  }
  const uint64_t rest = room - 12 * documents - 8 * entries;
  if (rest != 0 && rest != documents) {
    fail(file, ": ", rest, " bytes left after ", documents, " sequences and ", entries,
         " entries of the document index: the header is wrong", kMakeAgain);
  }
  if (entries == 0) fail(file, ": the document index is empty; it has at least its first entry, 0", kMakeAgain);
}

void IndexedDataset::check_pointers() const {
  const std::string file = index_.path().string();
  int64_t expected = 0;
  for (int64_t document = 0; document < documents_; ++document) {
    const int64_t tokens = length(document);
    const auto begin = load<int64_t>(field(4 * documents_, document, 8));
    if (tokens < 0) fail(file, ": sequence ", document, " has length ", tokens, kMakeAgain);
    if (begin != expected) {
      fail(file, ": sequence ", document, " begins at byte ", begin, ", but the lengths before it end at byte ",
           expected, kMakeAgain);
    }
    expected += tokens * item_bytes_;
  }
  const auto have = static_cast<int64_t>(data_.bytes().size());
  if (have != expected) {
    fail(data_.path().string(), ": ", have, " bytes, but ", file, " says ", expected,
         have < expected ? ": it was cut off, or belongs to another index" : ": it belongs to another index",
         kMakeAgain);
  }

  const auto entries = load<int64_t>(index_.bytes().data() + 26);
  int64_t before = 0;
  for (int64_t entry = 0; entry < entries; ++entry) {
    const auto sequence = load<int64_t>(field(12 * documents_, entry, 8));
    if (entry == 0 && sequence != 0) fail(file, ": the document index begins with ", sequence, ", not 0", kMakeAgain);
    if (sequence < before) {
      fail(file, ": entry ", entry, " of the document index is ", sequence, ", less than the entry before it, ", before,
           kMakeAgain);
    }
    before = sequence;
  }
  if (before != documents_) {
    fail(file, ": the document index ends with ", before, ", but there are ", documents_, " sequences", kMakeAgain);
  }
}

void IndexedDataset::read(int64_t document, int64_t begin, std::span<int64_t> out) const {
  const auto count = static_cast<int64_t>(out.size());
  if (document < 0 || document >= documents_ || begin < 0 || count > length(document) - begin) {
    throw std::out_of_range(text(prefix_, ": tokens ", begin, " to ", begin + count, " of document ", document));
  }
  const std::byte* from = data_.bytes().data() + (offset(document) + begin) * item_bytes_;
  with_type(code_, [&](auto item) {
    for (int64_t i = 0; i < count; ++i) out[i] = static_cast<int64_t>(load<decltype(item)>(from + i * item_bytes_));
  });
}

void IndexedDataset::check_tokens(int64_t vocab, int64_t begin, int64_t end) const {
  constexpr int64_t kBlock = 1 << 16;
  with_type(code_, [&](auto item) {
    using Item = decltype(item);
    const std::byte* data = data_.bytes().data();
    for (int64_t block = begin; block < end; block += kBlock) {
      const int64_t block_end = std::min(end, block + kBlock);
      Item low = 0, high = 0;
      for (int64_t i = block; i < block_end; ++i) {
        const auto id = load<Item>(data + i * sizeof(Item));
        low = std::min(low, id);
        high = std::max(high, id);
      }
      if (low >= 0 && static_cast<int64_t>(high) < vocab) continue;

      for (int64_t i = block; i < block_end; ++i) {
        const auto id = static_cast<int64_t>(load<Item>(data + i * sizeof(Item)));
        if (id >= 0 && id < vocab) continue;
        const int64_t document = document_at(i);
        fail_token(*this, document, i - offset(document), id, vocab);
      }
    }
  });
}

void fail_token(const IndexedDataset& data, int64_t document, int64_t position, int64_t id, int64_t vocab) {
  fail(data.prefix(), ".bin: document ", document, ", position ", position, ": token id ", id,
       ", but the model's ids are 0 to ", vocab - 1, "; was the data made with this model's tokenizer?");
}

}  // namespace upcycle
