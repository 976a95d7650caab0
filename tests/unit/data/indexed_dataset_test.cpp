#include "data/indexed_dataset.hpp"

#include <gtest/gtest.h>

#include "unit/data/indexed_files.hpp"

namespace upcycle {
namespace {

const Documents kDocuments = {{1, 2, 3}, {}, {100}, {4, 5, 6, 7}};

class Spoiled : public testing::Test {
 protected:
  Spoiled() { store(scratch_ / "x.bin", tokens_as<int32_t>(kDocuments)); }
  std::string message(const std::string& index_bytes) {
    store(scratch_ / "x.idx", index_bytes);
    const std::string said = user_error([&] { IndexedDataset((scratch_ / "x").string()); });
    has(said, (scratch_ / "x").string());  // every message names the file
    return said;
  }
  Scratch scratch_;
  Index index_ = index_of(kDocuments);
};

void expect_documents(const IndexedDataset& data, const Documents& documents) {
  SCOPED_TRACE(data.prefix() + " of " + data.dtype());
  ASSERT_EQ(data.documents(), static_cast<int64_t>(documents.size()));
  EXPECT_EQ(data.tokens(), tokens_in(documents));
  int64_t before = 0;
  for (int64_t d = 0; d < data.documents(); ++d) {
    ASSERT_EQ(data.length(d), static_cast<int64_t>(documents[d].size()));
    EXPECT_EQ(data.offset(d), before);
    std::vector<int64_t> read(documents[d].size());
    data.read(d, 0, read);
    EXPECT_EQ(read, documents[d]) << "document " << d;
    before += data.length(d);
  }
  EXPECT_EQ(data.offset(data.documents()), data.tokens());
}

template <class T>
void round_trip(uint8_t code, const Documents& documents) {
  const Scratch scratch;
  store(scratch / "x.bin", tokens_as<T>(documents));
  store(scratch / "x.idx", index_of(documents, code, sizeof(T)).bytes());
  expect_documents(IndexedDataset((scratch / "x").string()), documents);
}

TEST(IndexedDataset, EveryIntegerTypeToItsLimits) {
  round_trip<uint8_t>(1, {{0, 255}, {}, {7}});
  round_trip<int8_t>(2, {{-128, 127}, {}, {7}});
  round_trip<int16_t>(3, {{-32768, 32767}, {}, {7}});
  round_trip<int32_t>(4, {{-2147483648LL, 2147483647}, {}, {7}});
  round_trip<int64_t>(5, {{-9223372036854775807LL, 9223372036854775807LL}, {}, {7}});
  round_trip<uint16_t>(8, {{0, 65535}, {}, {7}});
}

// As tests/fixtures/megatron/contents.json says: megatron-core wrote them. In `sequences` some share a document.
TEST(IndexedDataset, ReadsFilesThatMegatronWrote) {
  const std::string folder = UPCYCLE_SOURCE_DIR "/tests/fixtures/megatron/";
  expect_documents(IndexedDataset(folder + "uint16"), {{0, 1, 65535}, {}, {65498}, {5, 4, 3, 2}});
  expect_documents(IndexedDataset(folder + "int32"), {{151642, 65536}, {0}, {}, {2147483647, 7, 65535}});
  expect_documents(IndexedDataset(folder + "uint8"), {{0, 1, 1}, {1}, {}, {0, 255}});
  expect_documents(IndexedDataset(folder + "sequences"), {{1, 2, 3}, {4}, {5, 6}, {}, {7}, {8, 9}});
}

TEST(IndexedDataset, ReadsPartsOfADocument) {
  const Scratch scratch;
  const IndexedDataset data(write_documents(scratch, kDocuments));
  std::vector<int64_t> two(2);
  data.read(3, 1, two);
  EXPECT_EQ(two, (std::vector<int64_t>{5, 6}));
  data.read(1, 0, {});
  EXPECT_THROW(data.read(3, 3, two), std::out_of_range);
  EXPECT_THROW(data.read(3, -1, two), std::out_of_range);
  EXPECT_THROW(data.read(4, 0, two), std::out_of_range);
  EXPECT_THROW(data.read(-1, 0, two), std::out_of_range);
}

TEST(IndexedDataset, NoDocumentsAndModesAreFine) {
  const Scratch scratch;
  const IndexedDataset empty(write_documents(scratch, {}));
  EXPECT_EQ(empty.documents(), 0);
  EXPECT_EQ(empty.tokens(), 0);
  empty.check_tokens(10);

  Index with_modes = index_of(kDocuments);
  with_modes.rest = std::string(4, '\0');
  write_documents(scratch, kDocuments, "modes");
  store(scratch / "modes.idx", with_modes.bytes());
  EXPECT_EQ(IndexedDataset((scratch / "modes").string()).tokens(), 8);
}

TEST(IndexedDataset, SeveralSequencesMayMakeOneDocument) {
  const Scratch scratch;
  const std::string prefix = write_documents(scratch, kDocuments);
  Index index = index_of(kDocuments);
  index.documents = {0, 3, 4};
  index.entries = 3;
  store(prefix + ".idx", index.bytes());
  EXPECT_EQ(IndexedDataset(prefix).documents(), 4);
}

TEST_F(Spoiled, MissingFiles) {
  has(user_error([&] { IndexedDataset((scratch_ / "x").string()); }), "x.idx: no such file");
  store(scratch_ / "y.idx", index_.bytes());
  has(user_error([&] { IndexedDataset((scratch_ / "y").string()); }), "y.bin: no such file");
}

TEST_F(Spoiled, Magic) {
  index_.magic = std::string("MMIDIDY\0\0", 9);
  has(message(index_.bytes()), "does not begin with MMIDIDX");
}

TEST_F(Spoiled, Version) {
  index_.version = 2;
  has(message(index_.bytes()), "version 2, but only version 1");
}

TEST_F(Spoiled, DtypeCode) {
  for (const int code : {0, 6, 7, 9, 255}) {
    index_.code = static_cast<uint8_t>(code);
    has(message(index_.bytes()), "dtype code " + std::to_string(code));
  }
  index_.code = 7;
  has(message(index_.bytes()), "floating point");
}

TEST_F(Spoiled, TruncatedHeader) {
  const std::string bytes = index_.bytes();
  for (const size_t size : {0, 8, 17, 33})
    has(message(bytes.substr(0, size)), std::to_string(size) + " bytes, but the header alone has 34");
}

TEST_F(Spoiled, CutOffAnywhere) {
  const std::string bytes = index_.bytes();
  for (size_t size = 34; size < bytes.size(); ++size) has(message(bytes.substr(0, size)), "cut off");
}

TEST_F(Spoiled, CountsPastTheEnd) {
  const uint64_t past[] = {5, 1'000'000, ~uint64_t{0}, uint64_t{1} << 63, ~uint64_t{0} / 12 + 1};
  for (const uint64_t count : past) {
    Index index = index_;
    index.sequences = count;
    has(message(index.bytes()), std::to_string(count) + " sequences");
    index = index_;
    index.entries = count + 1;
    if (count != ~uint64_t{0}) has(message(index.bytes()), std::to_string(count + 1) + " entries");
  }
}

TEST_F(Spoiled, CountsBelowTheFile) {
  index_.entries = 4;
  has(message(index_.bytes()), "8 bytes left");
}

TEST_F(Spoiled, NegativeLength) {
  index_.lengths[2] = -1;
  has(message(index_.bytes()), "sequence 2 has length -1");
}

TEST_F(Spoiled, OffsetsThatDisagree) {
  index_.offsets[3] += 4;
  has(message(index_.bytes()), "sequence 3 begins at byte 20, but the lengths before it end at byte 16");
  index_.offsets[3] = -4;
  has(message(index_.bytes()), "sequence 3 begins at byte -4");
  index_.offsets[0] = 4;
  has(message(index_.bytes()), "sequence 0 begins at byte 4");
}

TEST_F(Spoiled, DocumentIndex) {
  const std::vector<int64_t> good = index_.documents;
  index_.documents = {1, 1, 2, 3, 4};
  has(message(index_.bytes()), "begins with 1, not 0");
  index_.documents = {0, 3, 2, 3, 4};
  has(message(index_.bytes()), "entry 2 of the document index is 2, less than the entry before it, 3");
  index_.documents = {0, 1, 2, 3, 3};
  has(message(index_.bytes()), "ends with 3, but there are 4 sequences");
  index_.documents = {0, 1, 2, 3, 5};
  has(message(index_.bytes()), "ends with 5, but there are 4 sequences");
  index_.documents = {};
  index_.entries = 0;
  has(message(index_.bytes()), "document index is empty");
}

TEST_F(Spoiled, TokensOfAnotherSize) {
  const std::string tokens = tokens_as<int32_t>(kDocuments);
  store(scratch_ / "x.bin", tokens.substr(0, 31));
  has(message(index_.bytes()), "x.bin: 31 bytes, but");
  has(message(index_.bytes()), "cut off");
  store(scratch_ / "x.bin", "");
  has(message(index_.bytes()), "x.bin: 0 bytes, but");
  store(scratch_ / "x.bin", tokens + "abcd");
  has(message(index_.bytes()), "x.bin: 36 bytes, but");
}

TEST(CheckTokens, NamesDocumentPositionAndId) {
  const Scratch scratch;
  const IndexedDataset data(write_documents(scratch, kDocuments));
  data.check_tokens(101);
  const std::string said = user_error([&] { data.check_tokens(100); });
  has(said, data.prefix() + ".bin: document 2, position 0: token id 100, but the model's ids are 0 to 99");
  data.check_tokens(100, 4, 8);  // the tokens around it are fine
  data.check_tokens(100, 0, 3);
  has(user_error([&] { data.check_tokens(7); }), "document 2, position 0");
  has(user_error([&] { data.check_tokens(7, 4, 8); }), "document 3, position 3: token id 7");
}

TEST(CheckTokens, NegativeIdsAndLaterBlocks) {
  const Scratch scratch;
  Documents documents(3, std::vector<int64_t>(100'000, 5));
  documents[2][99'999] = -3;
  const IndexedDataset data(write_documents(scratch, documents));
  has(user_error([&] { data.check_tokens(6); }), "document 2, position 99999: token id -3");
  data.check_tokens(6, 0, 299'999);
}

TEST(CheckTokens, UnsignedIdsAreNotNegative) {
  const Scratch scratch;
  store(scratch / "x.bin", tokens_as<uint16_t>({{65535}}));
  store(scratch / "x.idx", index_of({{65535}}, 8, 2).bytes());
  const IndexedDataset data((scratch / "x").string());
  data.check_tokens(65536);
  has(user_error([&] { data.check_tokens(65535); }), "token id 65535");
}

}  // namespace
}  // namespace upcycle
