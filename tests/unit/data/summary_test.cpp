#include "data/summary.hpp"

#include <gtest/gtest.h>

#include <array>

#include "unit/data/indexed_files.hpp"

namespace upcycle {
namespace {

TEST(DataSummary, CountsWhatIsThere) {
  const Scratch folder;
  const IndexedDataset data(write_documents(folder, {{}, {5}, {7, 9}, {1, 2, 3}, {4, 4, 4, 4, 4, 4, 4, 4, 4}}));
  const DataSummary s = summarise(data, nullptr);
  EXPECT_STREQ(data.dtype(), "int32");
  EXPECT_EQ(s.documents, 5);
  EXPECT_EQ(s.tokens, 15);
  EXPECT_EQ(s.empty, 1);
  EXPECT_EQ(s.seen, 15);
  EXPECT_EQ(s.smallest_id, 1);
  EXPECT_EQ(s.largest_id, 9);
  EXPECT_FALSE(s.learned.has_value());
  const std::vector<std::array<int64_t, 4>> expected = {{0, 0, 1, 0}, {1, 1, 1, 1}, {2, 3, 2, 5}, {4, 7, 0, 0}, {8, 15, 1, 9}};
  ASSERT_EQ(s.lengths.size(), expected.size());
  for (size_t i = 0; i < expected.size(); ++i) {
    const LengthBucket& b = s.lengths[i];
    EXPECT_EQ((std::array<int64_t, 4>{b.from, b.to, b.documents, b.tokens}), expected[i]) << i;
  }
  const std::vector<std::pair<int, int64_t>> quantiles = {{0, 0}, {5, 0}, {25, 1}, {50, 2}, {75, 3}, {95, 9}, {99, 9}, {100, 9}};
  EXPECT_EQ(s.quantiles, quantiles);
}

TEST(DataSummary, OfManyTokensAnEvenSpread) {
  const Scratch folder;
  Documents documents;
  for (int64_t first = 0; first < 40000; first += 100) {
    documents.emplace_back();
    for (int64_t i = first; i < first + 100; ++i) documents.back().push_back(i);   // a token names its place
  }
  const IndexedDataset data(write_documents(folder, documents));
  const DataSummary s = summarise(data, nullptr, 4096);
  EXPECT_EQ(s.tokens, 40000);
  EXPECT_EQ(s.seen, 4096);
  EXPECT_EQ(s.smallest_id, 0) << "the first token is among them";
  EXPECT_EQ(s.largest_id, 39999) << "and the last";
  EXPECT_EQ(s.quantiles.back().second, 100) << "lengths are those of all";
}

TEST(DataSummary, TheMaskSaysWhatIsLearned) {
  const Scratch folder;
  const Documents documents = {{5, 6, 7}, {}, {8, 9, 10, 11, 12}};
  const IndexedDataset data(write_documents(folder, documents));
  const auto mask_of = [&](const Documents& bits) {
    store(folder / "text.mask.bin", tokens_as<uint8_t>(bits));
    store(folder / "text.mask.idx", index_of(bits, 1, 1).bytes());
    return IndexedDataset((folder / "text.mask").string());
  };
  const IndexedDataset good = mask_of({{0, 1, 1}, {}, {0, 0, 0, 1, 1}});
  EXPECT_DOUBLE_EQ(summarise(data, &good).learned.value(), 0.5);
  const IndexedDataset longer = mask_of({{0, 1}, {}, {0, 0, 0, 1, 1, 1}}), fewer = mask_of({{0, 1, 1}});
  EXPECT_THROW(summarise(data, &longer), UserError);
  EXPECT_THROW(summarise(data, &fewer), UserError);
}

TEST(DataSummary, NothingIsNoMistake) {
  const Scratch folder;
  const IndexedDataset data(write_documents(folder, {{}, {}}));
  const DataSummary s = summarise(data, nullptr);
  EXPECT_EQ(s.seen, 0);
  EXPECT_EQ(s.empty, 2);
}

TEST(DataPrefix, IsWhatBothFilesHaveInCommon) {
  const Scratch folder;
  const std::string prefix = write_documents(folder, {{1}});
  for (const char* ending : {"", ".bin", ".idx"}) EXPECT_EQ(data_prefix(prefix + ending), prefix);
  EXPECT_FALSE(data_prefix(folder.path().string()).has_value());
  EXPECT_FALSE(data_prefix(prefix + ".bim").has_value());
}

}  // namespace
}  // namespace upcycle
