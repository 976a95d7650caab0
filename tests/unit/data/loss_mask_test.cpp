#include "data/loss_mask.hpp"

#include <gtest/gtest.h>

#include <set>

#include "data/sampler.hpp"
#include "unit/data/indexed_files.hpp"

// B samples, S tokens of a sample
namespace upcycle {
namespace {

constexpr std::array<int64_t, 3> kOneSplit = {1, 0, 0};

// Tokens are numbered, so what is learned can be told from a label alone.
bool third(int64_t token) { return token % 3 == 0; }
bool always(int64_t) { return true; }
bool never(int64_t) { return false; }

Sampler sampler_of(const std::string& prefix, int64_t sequence, Borders borders = Borders::concatenated) {
  return Sampler({{1.0, prefix}}, kOneSplit, Split::train, sequence, 1 << 20, 1, borders);
}

/// learn says what `learned` says of every label; returns how many are learned.
template <class Learned>
int64_t expect_learned(const Batch& batch, Learned&& learned) {
  EXPECT_EQ(batch.learn_BS.sizes(), batch.labels_BS.sizes());
  int64_t count = 0;
  const int64_t* label = batch.labels_BS.const_data_ptr<int64_t>();
  const bool* learn = batch.learn_BS.const_data_ptr<bool>();
  for (int64_t i = 0; i < batch.labels_BS.numel(); ++i) {
    EXPECT_EQ(learn[i], learned(label[i])) << "label " << label[i];
    count += learn[i];
  }
  return count;
}

TEST(LossMask, IsOfTheLabels) {
  const Scratch scratch;
  const Documents documents = numbered(60);
  const std::string prefix = write_documents(scratch, documents);
  write_mask(scratch, mask_of(documents, third));
  for (const int64_t S : {1, 2, 5, 16, 64, 500}) {
    for (const Borders borders : {Borders::concatenated, Borders::packed}) {
      const Sampler sampler = sampler_of(prefix, S, borders);
      sampler.check(1 << 20);
      EXPECT_TRUE(sampler.masked());
      const int64_t n = sampler.samples();
      for (const int64_t first : {int64_t{0}, n - 1, 3 * n / 2}) {   // across the end of an epoch, too
        const Batch batch = sampler.batch(first, n);
        const int64_t learned = expect_learned(batch, third);
        EXPECT_EQ(sampler.learned(first, n), learned);
        EXPECT_EQ(batch.starts_BS.defined(), borders == Borders::packed);
      }
      EXPECT_EQ(sampler.learned(7, 0), 0);
    }
  }
}

TEST(LossMask, ChangesNothingElse) {
  const Scratch scratch;
  const Documents documents = numbered(60);
  const std::string prefix = write_documents(scratch, documents), masked = write_documents(scratch, documents, "masked");
  write_mask(scratch, mask_of(documents, never), "masked");
  const Batch a = sampler_of(prefix, 16, Borders::packed).batch(5, 40), b = sampler_of(masked, 16, Borders::packed).batch(5, 40);
  EXPECT_TRUE(a.tokens_BS.equal(b.tokens_BS) && a.labels_BS.equal(b.labels_BS) && a.starts_BS.equal(b.starts_BS));
  EXPECT_FALSE(a.learn_BS.defined());
  expect_learned(b, never);
}

TEST(LossMask, DataSetsWithAndWithoutOneBlend) {
  const Scratch scratch;
  const Documents a = numbered(60), b = numbered(60, 100'000);
  const std::vector<Blend> blend = {{0.5, write_documents(scratch, a, "a")}, {0.3, write_documents(scratch, b, "b")}, {0.2, "mock"}};
  const auto make = [&] { return Sampler(blend, kOneSplit, Split::train, 16, 1 << 20, 7); };
  EXPECT_FALSE(make().masked());
  EXPECT_FALSE(make().batch(0, 4).learn_BS.defined());
  EXPECT_EQ(make().learned(3, 10), 160);
  write_mask(scratch, mask_of(a, third), "a");
  const Sampler sampler = make();
  sampler.check(1 << 20);
  EXPECT_TRUE(sampler.masked());
  EXPECT_TRUE(sampler.data_sets()[0].masked);
  EXPECT_FALSE(sampler.data_sets()[1].masked || sampler.data_sets()[2].masked);
  int64_t of_a = 0;
  for (int64_t i = 0; i < 200; ++i) {
    const Batch batch = sampler.batch(i, 1);
    const bool from_a = batch.labels_BS.max().item<int64_t>() < 100'000 && batch.learn_BS.logical_not().any().item<bool>();
    of_a += from_a;
    const int64_t learned = from_a ? expect_learned(batch, third) : expect_learned(batch, always);
    EXPECT_EQ(sampler.learned(i, 1), learned);
  }
  EXPECT_EQ(of_a, 100);
}

TEST(LossMask, HowItIsReadDoesNotMatter) {
  const Scratch scratch;
  const Documents documents = numbered(60);
  const std::string prefix = write_documents(scratch, documents);
  write_mask(scratch, mask_of(documents, third));
  const Batch all = sampler_of(prefix, 16).batch(0, 300);
  for (const int64_t first : {0, 1, 77, 160, 299}) {
    EXPECT_TRUE(sampler_of(prefix, 16).batch(first, 1).learn_BS.equal(all.learn_BS.narrow(0, first, 1)));
    EXPECT_EQ(sampler_of(prefix, 16).learned(first, 1), all.learn_BS[first].sum().item<int64_t>());
  }
}

class BadMask : public testing::Test {
 protected:
  BadMask() : documents_(numbered(10)), prefix_(write_documents(scratch_, documents_)) {}
  std::string said() { return user_error([&] { sampler_of(prefix_, 8).check(1 << 20); }); }

  Scratch scratch_;
  Documents documents_;
  std::string prefix_;
};

TEST_F(BadMask, OtherDocuments) {
  Documents other = documents_;
  other[4].push_back(0);
  write_mask(scratch_, mask_of(other, third));
  has(said(), prefix_ + ".mask.idx: document 4 has 29 tokens, but 28 in " + prefix_ + ".idx: the mask is not of these tokens");
  other = documents_;
  other.pop_back();
  write_mask(scratch_, mask_of(other, third));
  has(said(), prefix_ + ".mask.idx: 9 documents, but 10 in " + prefix_ + ".idx; document 9 is the first that the mask lacks");
  other = documents_;
  other.push_back({1, 2});
  write_mask(scratch_, mask_of(other, third));
  has(said(), ".mask.idx: 11 documents, but 10 in " + prefix_ + ".idx; document 10 is the first that only the mask has");
}

TEST_F(BadMask, OtherDtypes) {
  store(scratch_ / "text.mask.bin", tokens_as<int32_t>(mask_of(documents_, third)));
  store(scratch_ / "text.mask.idx", index_of(documents_).bytes());
  has(said(), prefix_ + ".mask.idx: dtype code 4, but a mask has one uint8 (code 1) for each token");
}

TEST_F(BadMask, OtherValues) {
  Documents mask = mask_of(documents_, third);
  mask[5][3] = 2;
  write_mask(scratch_, mask);
  const std::string expected = prefix_ + ".mask.bin: document 5, position 3: value 2, but a mask says 1 (learned) or 0 (only read)";
  has(said(), expected);
  const Sampler sampler = sampler_of(prefix_, 8);
  has(user_error([&] { sampler.batch(0, sampler.samples()); }), expected);
}

TEST_F(BadMask, FilesThatAreNotThere) {
  write_mask(scratch_, mask_of(documents_, third));
  std::filesystem::rename(scratch_ / "text.mask.bin", scratch_ / "away");
  has(said(), ".mask.bin: no such file");
  std::filesystem::rename(scratch_ / "away", scratch_ / "text.mask.bin");
  std::filesystem::remove(scratch_ / "text.mask.idx");
  has(said(), prefix_ + ".mask.bin is there, but not its index " + prefix_ + ".mask.idx");
}

TEST_F(BadMask, NothingIsLearned) {
  write_mask(scratch_, mask_of(documents_, never));
  has(said(), prefix_ + ".mask.bin: the train share of split [1, 0, 0] has no token that is learned: its mask is 0 for all 151 tokens");
  Documents mask = mask_of(documents_, never);
  mask[9][5] = 1;
  write_mask(scratch_, mask);
  EXPECT_EQ(said(), "");
  // Only this part of the data counts.
  has(user_error([&] { Sampler({{1.0, prefix_}}, {8, 2, 0}, Split::train, 8, 1 << 20, 1).check(1 << 20); }), "train share of split [8, 2, 0]");
  Sampler({{1.0, prefix_}}, {8, 2, 0}, Split::validation, 8, 1 << 20, 1).check(1 << 20);
}

}  // namespace
}  // namespace upcycle
