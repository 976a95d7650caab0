#include "data/sampler.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <set>
#include <thread>

#include "unit/data/indexed_files.hpp"

// B samples, S tokens of a sample
namespace upcycle {
namespace {

constexpr std::array<int64_t, 3> kAll = {1, 0, 0};

using Rows = std::vector<std::vector<int64_t>>;  // a sample each, S + 1 tokens

Rows rows(const Batch& batch) {
  Rows out;
  const int64_t S = batch.tokens_BS.size(1);
  for (int64_t b = 0; b < batch.tokens_BS.size(0); ++b) {
    const int64_t* tokens = batch.tokens_BS.const_data_ptr<int64_t>() + b * S;
    const int64_t* labels = batch.labels_BS.const_data_ptr<int64_t>() + b * S;
    std::vector<int64_t> row(tokens, tokens + S);
    row.push_back(labels[S - 1]);
    for (int64_t s = 0; s + 1 < S; ++s) EXPECT_EQ(labels[s], tokens[s + 1]);
    out.push_back(row);
  }
  return out;
}

Sampler one(const std::string& prefix, int64_t sequence, uint64_t seed = 1, int64_t vocab = 1 << 20) {
  return Sampler({{1.0, prefix}}, kAll, Split::train, sequence, vocab, seed);
}

// Tokens are numbered, so an epoch can be pieced together: the S input tokens of its samples are disjoint, and all but
// fewer than S + 1 of the data set's tokens are there.
TEST(Sampler, EveryTokenOnceAnEpochWhateverTheSequence) {
  const Scratch scratch;
  const Documents documents = numbered(60);
  const std::string prefix = write_documents(scratch, documents);
  for (const int64_t S : {1, 2, 5, 16, 64, 500}) {
    const Sampler sampler = one(prefix, S);
    ASSERT_EQ(sampler.tokens(), tokens_in(documents));
    ASSERT_EQ(sampler.samples(), (tokens_in(documents) - 1) / S);
    for (int64_t epoch = 0; epoch < 3; ++epoch) {
      std::set<int64_t> seen;
      for (const auto& row : rows(sampler.batch(epoch * sampler.samples(), sampler.samples()))) {
        ASSERT_EQ(static_cast<int64_t>(row.size()), S + 1);
        for (int64_t s = 0; s < S; ++s) ASSERT_TRUE(seen.insert(row[s]).second) << "token " << row[s] << " twice";
      }
      EXPECT_GT(static_cast<int64_t>(seen.size()), tokens_in(documents) - S - 1);
    }
  }
}

// Inside a sample the text is the documents' own: each token is followed by its successor, or ends a document and is
// followed by the beginning of one; and each sample's last token is the first of another (or the epoch's last).
TEST(Sampler, SamplesAreWholeStretchesOfDocuments) {
  const Scratch scratch;
  const Documents documents = numbered(60);
  std::set<int64_t> firsts, lasts;
  for (const auto& document : documents) {
    if (!document.empty()) firsts.insert(document.front()), lasts.insert(document.back());
  }
  const Sampler sampler = one(write_documents(scratch, documents), 16);
  std::set<int64_t> begins;
  std::vector<int64_t> ends;
  for (const auto& row : rows(sampler.batch(0, sampler.samples()))) {
    for (size_t s = 0; s + 1 < row.size(); ++s) {
      if (row[s + 1] == row[s] + 1) continue;
      EXPECT_TRUE(lasts.contains(row[s]) && firsts.contains(row[s + 1])) << row[s] << " is followed by " << row[s + 1];
    }
    begins.insert(row.front());
    ends.push_back(row.back());
  }
  int64_t loose = 0;
  for (const int64_t end : ends) loose += !begins.contains(end);
  EXPECT_EQ(loose, 1);
}

TEST(Sampler, EpochsAndSeedsDifferButRepeatThemselves) {
  const Scratch scratch;
  const std::string prefix = write_documents(scratch, numbered(60));
  const Sampler a = one(prefix, 16, 1), b = one(prefix, 16, 1), c = one(prefix, 16, 2);
  const int64_t n = a.samples();
  std::set<Rows> seen;
  for (int64_t epoch = 0; epoch < 5; ++epoch) {
    const Rows rows_a = rows(a.batch(epoch * n, n));
    EXPECT_TRUE(seen.insert(rows_a).second);
    EXPECT_TRUE(seen.insert(rows(c.batch(epoch * n, n))).second);
    EXPECT_EQ(rows_a, rows(b.batch(epoch * n, n)));
  }
  EXPECT_EQ(rows(a.batch(0, n)), rows(b.batch(0, n))) << "back to the first epoch";
}

// Where a document starts is said for every token, the same for any way of reading; the tokens are those without borders.
TEST(Sampler, PackedSamplesTellWhereDocumentsStart) {
  const Scratch scratch;
  Documents documents = numbered(60);
  std::map<int64_t, size_t> document_of;
  for (size_t d = 0; d < documents.size(); ++d) {
    for (const int64_t token : documents[d]) document_of[token] = d;
  }
  const std::string prefix = write_documents(scratch, documents);
  for (const int64_t S : {1, 5, 16, 64, 500}) {
    const Sampler packed({{1.0, prefix}}, kAll, Split::train, S, 1 << 20, 1, Borders::packed);
    const Batch batch = packed.batch(0, 2 * packed.samples()), plain = one(prefix, S).batch(0, 2 * packed.samples());
    EXPECT_FALSE(plain.starts_BS.defined());
    EXPECT_TRUE(batch.tokens_BS.equal(plain.tokens_BS) && batch.labels_BS.equal(plain.labels_BS));
    ASSERT_EQ(batch.starts_BS.sizes(), batch.tokens_BS.sizes());
    int64_t borders = 0;
    for (int64_t b = 0; b < batch.tokens_BS.size(0); ++b) {
      const int64_t* token = batch.tokens_BS.const_data_ptr<int64_t>() + b * S;
      const int64_t* start = batch.starts_BS.const_data_ptr<int64_t>() + b * S;
      for (int64_t s = 0; s < S; ++s) {
        const bool begins = s == 0 || document_of.at(token[s]) != document_of.at(token[s - 1]);
        ASSERT_EQ(start[s], begins ? s : start[s - 1]) << "sample " << b << ", place " << s;
        borders += begins && s > 0;
      }
    }
    EXPECT_GT(borders, S == 1 ? -1 : 20);
    EXPECT_TRUE(packed.batch(1, 2).starts_BS.equal(batch.starts_BS.narrow(0, 1, 2)));
  }
}

TEST(Mock, ASampleIsOneDocument) {
  const Sampler sampler({{1.0, "mock"}}, kAll, Split::train, 16, 100, 1, Borders::packed);
  const Batch batch = sampler.batch(0, 3);
  EXPECT_EQ(batch.starts_BS.sizes(), batch.tokens_BS.sizes());
  EXPECT_EQ(batch.starts_BS.abs().max().item<int64_t>(), 0);
}

// The neighbours of a document change from epoch to epoch, not only the order of samples.
TEST(Sampler, DocumentsGetNewNeighbours) {
  const Scratch scratch;
  const Sampler sampler = one(write_documents(scratch, numbered(60)), 64);
  const int64_t n = sampler.samples();
  const auto joints = [&](int64_t epoch) {
    std::set<std::pair<int64_t, int64_t>> out;
    for (const auto& row : rows(sampler.batch(epoch * n, n))) {
      for (size_t s = 0; s + 1 < row.size(); ++s) {
        if (row[s + 1] != row[s] + 1) out.insert({row[s], row[s + 1]});
      }
    }
    return out;
  };
  const auto first = joints(0), second = joints(1);
  int64_t common = 0;
  for (const auto& joint : first) common += second.contains(joint);
  EXPECT_GT(first.size(), 40u);
  EXPECT_LT(common, 10);
}

// One rank or many, large or small micro-batches, started anew in the middle: sample i is sample i.
TEST(Sampler, HowItIsReadDoesNotMatter) {
  const Scratch scratch;
  const std::vector<Blend> blend = {{0.6, write_documents(scratch, numbered(60), "a")},
                                    {0.3, write_documents(scratch, numbered(30, 100'000), "b")},
                                    {0.1, "mock"}};
  const auto make = [&] { return Sampler(blend, kAll, Split::train, 16, 1 << 20, 7); };
  const Rows all = rows(make().batch(0, 600));
  const Sampler sampler = make();
  for (const int64_t first : {0, 1, 77, 300, 599}) EXPECT_EQ(rows(sampler.batch(first, 1)).front(), all[first]);
  for (const int64_t ranks : {2, 4, 8}) {
    for (int64_t rank = ranks - 1; rank >= 0; --rank) {
      const Sampler mine = make();
      for (int64_t step = 0; step < 600 / (ranks * 3); ++step) {
        const int64_t first = (step * ranks + rank) * 3;
        const Rows part = rows(mine.batch(first, 3));
        for (int64_t b = 0; b < 3; ++b) ASSERT_EQ(part[b], all[first + b]);
      }
    }
  }
  EXPECT_EQ(sampler.batch(5, 0).tokens_BS.size(0), 0);
  EXPECT_THROW(sampler.batch(-1, 1), std::out_of_range);
  EXPECT_THROW(sampler.batch(0, -1), std::out_of_range);
}

TEST(Sampler, SeveralThreadsMayRead) {
  const Scratch scratch;
  const Sampler sampler = one(write_documents(scratch, numbered(60)), 16);
  const Rows all = rows(sampler.batch(0, 400));
  std::vector<Rows> got(4);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) threads.emplace_back([&, t] { got[t] = rows(sampler.batch(100 * t, 100)); });
  for (auto& thread : threads) thread.join();
  for (int t = 0; t < 4; ++t) EXPECT_EQ(got[t], Rows(all.begin() + 100 * t, all.begin() + 100 * t + 100));
}

// Positions are stored in checkpoints, so the order may never change by accident.
TEST(Sampler, TheOrderIsPinned) {
  const Scratch scratch;
  const Sampler sampler({{0.75, write_documents(scratch, numbered(60))}, {0.25, "mock"}}, kAll, Split::train, 16, 2000,
                        1234);
  std::vector<int64_t> begins;
  for (const auto& row : rows(sampler.batch(0, 12))) begins.push_back(row.front());
  EXPECT_EQ(begins, (std::vector<int64_t>{615, 568, 700, 409, 302, 462, 427, 433, 584, 218, 64, 401}));
}

TEST(Sampler, BlendsGoByTheirWeights) {
  const Scratch scratch;
  const Documents a = numbered(60), b = numbered(20, 100'000);
  const Sampler sampler({{3, write_documents(scratch, a, "a")}, {1, write_documents(scratch, b, "b")}}, kAll,
                        Split::train, 16, 1 << 20, 1);
  EXPECT_EQ(sampler.tokens(), tokens_in(a) + tokens_in(b));
  EXPECT_EQ(sampler.samples(), (tokens_in(a) - 1) / 16 + (tokens_in(b) - 1) / 16);
  int64_t from_b = 0, n = 0;
  for (const auto& row : rows(sampler.batch(0, 400))) {
    from_b += row.front() >= 100'000;
    EXPECT_LE(std::abs(from_b - 0.25 * ++n), 1.0);
  }
}

TEST(Sampler, SaysHowOftenDataIsPassed) {
  const Scratch scratch;
  const Documents a = numbered(60), b = numbered(20, 100'000);
  const std::vector<Blend> blend = {{3, write_documents(scratch, a, "a")}, {1, write_documents(scratch, b, "b")}};
  const Sampler sampler(blend, kAll, Split::train, 16, 1 << 20, 1);
  const auto data = sampler.data_sets();
  ASSERT_EQ(data.size(), 2U);
  EXPECT_EQ(data[1].prefix, (scratch / "b").string());
  EXPECT_EQ(data[0].samples, (tokens_in(a) - 1) / 16);
  EXPECT_DOUBLE_EQ(data[0].share, 0.75);

  std::vector<size_t> of;   // which data set each sample is of
  for (const auto& row : rows(sampler.batch(0, 600))) of.push_back(row.front() >= 100'000 ? 1 : 0);
  for (const double epochs : {0.01, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0}) {
    std::array<int64_t, 2> drawn{};
    int64_t expected = 0;   // before the first sample that is one too many
    for (; expected < 600; ++expected) {
      const size_t d = of[static_cast<size_t>(expected)];
      for (size_t each = 0; each < 2; ++each) ASSERT_EQ(sampler.drawn(each, expected), drawn[each]);
      if (static_cast<double>(++drawn[d]) > epochs * static_cast<double>(data[d].samples)) break;
    }
    ASSERT_LT(expected, 600);
    EXPECT_EQ(sampler.within(epochs, expected), expected) << epochs;
    EXPECT_EQ(sampler.within(epochs, expected + 1), expected) << epochs;
    EXPECT_EQ(sampler.within(epochs, int64_t{1} << 50), expected) << epochs;
  }
  const Sampler mock({{1.0, "mock"}}, kAll, Split::train, 16, 100, 1);
  EXPECT_EQ(mock.data_sets().front().samples, 0);
  EXPECT_EQ(mock.within(0.5, 1'000'000), 1'000'000) << "it never repeats itself";
}

// Python: round(0.9999 * 12345) etc., as Megatron's split_matrix and numpy.round give them.
TEST(Documents, AreSharedOutAsMegatronDoes) {
  const auto share = [](Split part, std::array<int64_t, 3> split, int64_t n) { return documents_of(part, split, n); };
  using Range = std::pair<int64_t, int64_t>;
  EXPECT_EQ(share(Split::train, {99990, 8, 2}, 12345), (Range{0, 12344}));
  EXPECT_EQ(share(Split::validation, {99990, 8, 2}, 12345), (Range{12344, 12345}));
  EXPECT_EQ(share(Split::test, {99990, 8, 2}, 12345), (Range{12345, 12345}));
  EXPECT_EQ(share(Split::train, {1, 1, 0}, 5), (Range{0, 2})) << "2.5 goes to the even number";
  EXPECT_EQ(share(Split::train, {1, 1, 0}, 7), (Range{0, 4})) << "3.5 goes to the even number";
  EXPECT_EQ(share(Split::train, {969, 30, 1}, 100), (Range{0, 97}));
  EXPECT_EQ(share(Split::validation, {969, 30, 1}, 100), (Range{97, 100}));
  EXPECT_EQ(share(Split::train, {1, 0, 0}, 9), (Range{0, 9}));
  EXPECT_EQ(share(Split::validation, {0, 1, 0}, 9), (Range{0, 9}));
  EXPECT_EQ(share(Split::test, {0, 0, 7}, 9), (Range{0, 9}));
  for (int64_t n = 0; n < 200; ++n) {
    EXPECT_EQ(share(Split::train, {7, 2, 3}, n).second, share(Split::validation, {7, 2, 3}, n).first);
    EXPECT_EQ(share(Split::validation, {7, 2, 3}, n).second, share(Split::test, {7, 2, 3}, n).first);
    EXPECT_EQ(share(Split::test, {7, 2, 3}, n).second, n);
  }
  has(user_error([&] { share(Split::train, {0, 0, 0}, 9); }), "[data].split = [0, 0, 0]: shares");
  has(user_error([&] { share(Split::train, {5, -1, 0}, 9); }), "[data].split = [5, -1, 0]: shares");
}

TEST(Sampler, PartsShareNoToken) {
  const Scratch scratch;
  const std::string prefix = write_documents(scratch, numbered(60));
  std::set<int64_t> seen;
  for (const Split part : {Split::train, Split::validation, Split::test}) {
    const Sampler sampler({{1.0, prefix}}, {8, 1, 1}, part, 8, 1 << 20, 1);
    for (const auto& row : rows(sampler.batch(0, sampler.samples()))) {
      for (size_t s = 0; s + 1 < row.size(); ++s) EXPECT_TRUE(seen.insert(row[s]).second);
    }
  }
}

TEST(Sampler, TooLittleTextForOneSample) {
  const Scratch scratch;
  const std::string prefix = write_documents(scratch, {{1, 2, 3}, {4, 5}, {}});
  EXPECT_EQ(one(prefix, 4).samples(), 1);
  has(user_error([&] { one(prefix, 5); }),
      prefix +
          ": the train share of split [1, 0, 0] has 5 tokens in 3 of 3 documents, but one "
          "sample of [train].sequence = 5 needs 6");
  has(user_error([&] {
        Sampler({{1.0, prefix}}, {99990, 8, 2}, Split::validation, 2, 100, 1);
      }),
      "the validation share of split [99990, 8, 2] has 0 tokens in 0 of 3 documents");
  has(user_error([&] { one((scratch / "absent").string(), 4); }), "absent.idx: no such file");
}

TEST(Sampler, TokensOutsideOfTheVocabulary) {
  const Scratch scratch;
  const std::string prefix = write_documents(scratch, {{1, 2, 3}, {4, 50, 6}, {7, 8, 9}});
  const Sampler sampler = one(prefix, 4, 1, 50);
  has(user_error([&] { sampler.check(50); }),
      prefix + ".bin: document 1, position 1: token id 50, but the model's ids are 0 to 49");
  has(user_error([&] { sampler.batch(0, sampler.samples()); }), prefix + ".bin: document 1, position 1: token id 50");
  sampler.check(51);
  // Only this part of the data counts.
  Sampler({{1.0, prefix}}, {1, 2, 0}, Split::train, 2, 50, 1).check(50);
  has(user_error([&] { Sampler({{1.0, prefix}}, {1, 2, 0}, Split::validation, 2, 50, 1).check(50); }), "token id 50");
}

// 2.1e9 one-byte tokens, as a file of holes: check() looks at pieces, the first and the last token among them, and
// batch() at the rest.
TEST(Sampler, LargeDataIsCheckedInPieces) {
  const Scratch scratch;
  constexpr int64_t kTokens = 2'100'000'000;
  Index index;
  index.code = 1;
  index.sequences = 1;
  index.entries = 2;
  index.lengths = {static_cast<int32_t>(kTokens)};
  index.offsets = {0};
  index.documents = {0, 1};
  store(scratch / "x.idx", index.bytes());
  const auto bad_at = [&](int64_t position) {
    store(scratch / "x.bin", "");
    std::filesystem::resize_file(scratch / "x.bin", kTokens);
    std::fstream file(scratch / "x.bin", std::ios::binary | std::ios::in | std::ios::out);
    file.seekp(position);
    file.put('\xff');
    file.close();
    return user_error([&] { one((scratch / "x").string(), 8, 1, 200).check(200); });
  };
  has(bad_at(0), "document 0, position 0: token id 255");
  has(bad_at(kTokens - 1), "position 2099999999: token id 255");
  EXPECT_EQ(bad_at(2'000'000), "") << "between two pieces";
}

TEST(Mock, IsALanguageThatCanBeLearned) {
  const Sampler sampler({{1.0, "mock"}}, {99990, 8, 2}, Split::train, 64, 2048, 1);
  EXPECT_EQ(sampler.samples(), 0);
  sampler.check(2048);
  std::map<int64_t, std::map<int64_t, int64_t>> next;
  int64_t pairs = 0;
  for (const auto& row : rows(sampler.batch(0, 4000))) {
    for (size_t s = 0; s + 1 < row.size(); ++s, ++pairs) {
      ASSERT_TRUE(row[s] >= 0 && row[s] < 2048);
      ++next[row[s]][row[s + 1]];
    }
  }
  EXPECT_EQ(next.size(), 1024u);
  double nats = 0;  // entropy of the next token given this one
  for (const auto& [token, count] : next) {
    ASSERT_LE(count.size(), 4u);
    int64_t sum = 0;
    for (const auto& [unused, n] : count) sum += n;
    for (const auto& [unused, n] : count)
      nats -= static_cast<double>(n) / pairs * std::log(static_cast<double>(n) / sum);
  }
  EXPECT_NEAR(nats, std::log(4.0), 0.01);
}

TEST(Mock, PartsAndSeedsAreDifferentTextOfOneLanguage) {
  const auto text = [](Split part, uint64_t seed, int64_t vocab = 100) {
    return rows(Sampler({{1.0, "mock"}}, kAll, part, 16, vocab, seed).batch(0, 50));
  };
  const Rows train = text(Split::train, 1);
  EXPECT_EQ(train, text(Split::train, 1));
  EXPECT_NE(train, text(Split::validation, 1));
  EXPECT_NE(train, text(Split::train, 2));
  const Rows validation = text(Split::validation, 1), other = text(Split::train, 2);
  for (const Rows* sample : {&train, &validation, &other}) {
    for (const auto& row : *sample) {
      for (size_t s = 0; s + 1 < row.size(); ++s) {
        ASSERT_TRUE(row[s] < 100);
        EXPECT_LT((row[s + 1] - 5 * row[s] - 7 + 1000) % 100, 4);
      }
    }
  }
  EXPECT_EQ(text(Split::train, 1, 1).front().front(), 0);  // a vocabulary of one
}

}  // namespace
}  // namespace upcycle
