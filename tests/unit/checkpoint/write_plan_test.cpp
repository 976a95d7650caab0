#include "checkpoint/write_plan.hpp"

#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <numeric>

#include "base/error.hpp"
#include "checkpoint/boxes.hpp"
#include "checkpoint/tensor_file.hpp"

namespace upcycle {
namespace {

using testing::HasSubstr;

Piece piece(const std::string& name, const Shape& shape, const Box& box, at::ScalarType dtype = at::kFloat) {
  return {name, shape, box, at::zeros(box.size, dtype)};
}

/// What is wrong with these pieces, one list a rank; "" for nothing.
std::string verdict(const std::vector<std::vector<Piece>>& ranks) {
  std::vector<std::string> declarations;
  for (const auto& pieces : ranks) declarations.push_back(declare(pieces));
  try {
    plan_writes(declarations);
  } catch (const std::logic_error& error) {
    return error.what();
  }
  return "";
}

TEST(WritePlan, AcceptsBoxesThatTile) {
  EXPECT_EQ(verdict({}), "");
  EXPECT_EQ(verdict({{piece("a", {4, 6}, whole({4, 6}))}, {}}), "");
  EXPECT_EQ(
      verdict({{piece("a", {4, 6}, {{0, 0}, {2, 3}}), piece("a", {4, 6}, {{2, 3}, {2, 3}}), piece("s", {}, {{}, {}})},
               {piece("a", {4, 6}, {{0, 3}, {2, 3}})},
               {piece("a", {4, 6}, {{2, 0}, {2, 3}}), piece("a", {4, 6}, {{1, 1}, {0, 3}}),
                piece("none", {0, 2}, whole({0, 2}))}}),
      "");
}

TEST(WritePlan, NamesTheTensorThatIsWrong) {
  EXPECT_THAT(verdict({{piece("a", {4}, {{0}, {2}})}, {}}), HasSubstr("tensor 'a' [4]: all ranks' boxes cover 2 of 4"));
  EXPECT_THAT(verdict({{piece("a", {4}, {{0}, {3}})}, {piece("a", {4}, {{2}, {2}})}}),
              HasSubstr("the boxes [0:3] of rank 0 and [2:4] of rank 1 overlap"));
  EXPECT_THAT(verdict({{piece("a", {4}, {{0}, {2}})}, {piece("a", {4}, {{0}, {2}})}}), HasSubstr("cover 2 of 4")) << "replicas";
  EXPECT_THAT(verdict({{piece("a", {4}, {{0}, {4}}), piece("a", {4}, {{0}, {4}})}}), HasSubstr("overlap")) << "twice on one rank";
  EXPECT_THAT(verdict({{piece("a", {4}, {{1}, {4}})}}), HasSubstr("the box [1:5] of rank 0 is not inside"));
  EXPECT_THAT(verdict({{piece("a", {4}, {{0}, {2}})}, {piece("a", {5}, {{2}, {2}})}}),
              HasSubstr("rank 1 says Float[5], rank 0 says Float[4]"));
  EXPECT_THAT(verdict({{piece("a", {4}, {{0}, {2}})}, {piece("a", {4}, {{2}, {2}}, at::kBFloat16)}}),
              HasSubstr("BFloat16"));
  for (const char* name : {"", ".", "a..b", ".a", "a.", "a/b"}) {
    EXPECT_THAT(verdict({{piece(name, {1}, whole({1}))}}), HasSubstr("can't name a tensor")) << name;
  }
  const Piece wrong{"a", {4}, {{0}, {4}}, at::zeros({3})};
  EXPECT_THROW(declare(std::span(&wrong, 1)), std::logic_error);
}

std::vector<std::string> declared(const std::vector<std::vector<Piece>>& ranks) {
  std::vector<std::string> out;
  for (const auto& pieces : ranks) out.push_back(declare(pieces));
  return out;
}

// A piece without values, of any size.
Piece claim(const std::string& name, const Shape& shape, const Box& box, at::ScalarType dtype = at::kFloat) {
  Piece piece{name, shape, box, {}};
  piece.stored = dtype;
  return piece;
}

// Every block once, its parts tile it, its writer holds at least as much of it as any other rank that has a part; bytes by writer.
std::vector<int64_t> expect_sound(const WritePlan& plan, size_t ranks) {
  std::vector<int64_t> bytes(ranks);
  size_t next = 0;
  for (size_t tensor = 0; tensor < plan.tensors.size(); ++tensor) {
    const TensorSpec& spec = plan.tensors[tensor];
    const auto width = static_cast<int64_t>(c10::elementSize(spec.dtype));
    const Blocks blocks(spec.shape, width);
    for (int64_t number = 0; number < blocks.count(); ++number, ++next) {
      const WritePlan::Block& block = plan.blocks.at(next);
      EXPECT_EQ(block.tensor, tensor);
      EXPECT_EQ(block.number, number);
      const ElementRange run = blocks.run(number);
      int64_t covered = 0;
      std::map<int, int64_t> share;
      for (const WritePlan::Part& part : block.parts) {
        const ElementRange span = span_of(part.box, spec.shape);
        EXPECT_TRUE(run.begin <= span.begin && span.end <= run.end) << spec.name << ' ' << number << ' ' << describe(part.box);
        covered += elements(part.box);
        share[part.rank] += elements(part.box);
      }
      EXPECT_EQ(covered, run.size()) << spec.name << ' ' << number;
      for (const auto& [rank, size] : share) EXPECT_LE(size, share[block.writer]) << spec.name << ' ' << number;
      bytes[static_cast<size_t>(block.writer)] += run.size() * width;
    }
  }
  EXPECT_EQ(next, plan.blocks.size());
  return bytes;
}

TEST(WritePlan, ColumnCutsTravelAndAreSpreadEvenly) {
  std::vector<std::vector<Piece>> ranks(4);
  const Shape shape{4096, 4096};
  for (int64_t rank = 0; rank < 4; ++rank) ranks[static_cast<size_t>(rank)] = {claim("w", shape, {{0, rank * 1024}, {4096, 1024}})};
  const WritePlan plan = plan_writes(declared(ranks));
  EXPECT_EQ(plan.blocks.size(), 16u);   // 64 MiB
  EXPECT_THAT(expect_sound(plan, 4), testing::Each(int64_t{16} << 20));
  EXPECT_TRUE(plan.blocks[0].travels());
}

TEST(WritePlan, ReplicasAreWrittenOnceBySomeOfTheirHolders) {
  const Shape shape{64, 512, 256};
  const std::vector<std::vector<Piece>> ranks(8, {claim("w", shape, whole(shape)), claim("norm", {256}, whole({256}))});
  const WritePlan plan = plan_writes(declared(ranks));
  const std::vector<int64_t> bytes = expect_sound(plan, 8);
  for (const WritePlan::Block& block : plan.blocks) EXPECT_FALSE(block.travels());
  EXPECT_LE(*std::max_element(bytes.begin(), bytes.end()) - *std::min_element(bytes.begin(), bytes.end()), Blocks::kBytes);
}

TEST(WritePlan, RunsThatCutThroughRowsMeetInOneBlock) {
  // ZeRO-1: each of 3 ranks a third of the elements, in boxes of at most one run.
  const Shape shape{7, 300, 1000};
  std::vector<std::vector<Piece>> ranks(3);
  for (int64_t rank = 0; rank < 3; ++rank) {
    for (const Box& box : boxes_of_run(shape, elements(shape) * rank / 3, elements(shape) * (rank + 1) / 3)) {
      ranks[static_cast<size_t>(rank)].push_back(claim("w", shape, box, at::kBFloat16));
    }
  }
  const WritePlan plan = plan_writes(declared(ranks));
  expect_sound(plan, 3);
  const auto travel = std::count_if(plan.blocks.begin(), plan.blocks.end(), [](const WritePlan::Block& block) { return block.travels(); });
  EXPECT_GE(travel, 1);
  EXPECT_LE(travel, 2) << "only the blocks at the two borders";
}

// More elements, and more bytes, than an int can count.
TEST(WritePlan, TensorsOfMoreThan2To31Elements) {
  const Shape shape{5, 32768, 16384};
  const int64_t count = elements(shape), bytes = 2 * count;
  ASSERT_GT(count, int64_t{1} << 31);
  const auto cut = [&](size_t dim, int64_t ranks) {   // along one dim, unevenly where it must be
    std::vector<std::vector<Piece>> out;
    for (int64_t rank = 0; rank < ranks; ++rank) {
      Box box = whole(shape);
      box.begin[dim] = shape[dim] * rank / ranks;
      box.size[dim] = shape[dim] * (rank + 1) / ranks - box.begin[dim];
      out.push_back({claim("w", shape, box, at::kBFloat16)});
    }
    return out;
  };
  std::vector<std::vector<Piece>> runs(7);   // ZeRO-1
  for (int64_t rank = 0; rank < 7; ++rank) {
    for (const Box& box : boxes_of_run(shape, count * rank / 7, count * (rank + 1) / 7)) runs[static_cast<size_t>(rank)].push_back(claim("w", shape, box, at::kBFloat16));
  }
  for (const auto& ranks : {cut(0, 1), cut(0, 3), cut(1, 3), cut(2, 4), runs}) {
    SCOPED_TRACE(text(ranks.size(), " ranks, the last with ", describe(ranks.back().back().box)));
    const WritePlan plan = plan_writes(declared(ranks));
    EXPECT_EQ(plan.blocks.size(), static_cast<size_t>(bytes / Blocks::kBytes));
    const std::vector<int64_t> written = expect_sound(plan, ranks.size());
    EXPECT_EQ(std::accumulate(written.begin(), written.end(), int64_t{0}), bytes);
    int64_t rows = 0;
    for (const WritePlan::Part& part : plan.blocks.back().parts) {
      EXPECT_EQ(part.box.begin[0], 4);
      EXPECT_EQ(part.box.begin[1] + part.box.size[1], 32768);
      rows = std::max(rows, part.box.size[1]);
    }
    EXPECT_EQ(rows, Blocks::kBytes / (2 * 16384));
    size_t travelling = 0;
    for (const std::vector<size_t>& round : rounds(plan, int64_t{16} << 20)) travelling += round.size();
    const auto travel = std::count_if(plan.blocks.begin(), plan.blocks.end(), [](const WritePlan::Block& block) { return block.travels(); });
    EXPECT_EQ(travelling, static_cast<size_t>(travel));
  }
}

TEST(WritePlan, RoundsKeepEveryRanksTrafficBounded) {
  std::vector<std::vector<Piece>> ranks(3);
  const Shape shape{3000, 3000};
  for (int64_t rank = 0; rank < 3; ++rank) ranks[static_cast<size_t>(rank)] = {claim("w", shape, {{0, rank * 1000}, {3000, 1000}})};
  const WritePlan plan = plan_writes(declared(ranks));
  const int64_t most = int64_t{8} << 20;
  size_t blocks = 0;
  for (const std::vector<size_t>& round : rounds(plan, most)) {
    std::map<int, int64_t> sent, received;
    for (const size_t index : round) {
      for (const WritePlan::Part& part : plan.blocks[index].parts) {
        if (part.rank == plan.blocks[index].writer) continue;
        sent[part.rank] += 4 * elements(part.box);
        received[plan.blocks[index].writer] += 4 * elements(part.box);
      }
    }
    for (const auto& [rank, bytes] : sent) EXPECT_LE(bytes, most);
    for (const auto& [rank, bytes] : received) EXPECT_LE(bytes, most);
    blocks += round.size();
  }
  EXPECT_EQ(blocks, plan.blocks.size()) << "every block has columns of all ranks";
}

TEST(Blocks, AreWholeRowsOfAboutFourMegabytesOnPageBorders) {
  for (const auto& [shape, width] : std::vector<std::pair<Shape, int64_t>>{{{64, 768, 2048}, 2}, {{5000, 1110}, 4}, {{3000000}, 4}, {{}, 4}, {{151936, 1024}, 2}, {{5, 32768, 16384}, 2}}) {
    const Blocks blocks(shape, width);
    const int64_t row = shape.size() < 2 ? 1 : shape.back();
    int64_t next = 0;
    for (int64_t number = 0; number < blocks.count(); ++number) {
      const ElementRange run = blocks.run(number);
      EXPECT_EQ(run.begin, next);
      EXPECT_EQ(run.begin % row, 0);
      EXPECT_EQ(run.begin * width % Blocks::kAlignment, 0) << describe(shape);
      EXPECT_LE(run.size() * width, Blocks::kBytes);
      EXPECT_EQ(blocks.of(run.begin), number);
      EXPECT_EQ(blocks.of(run.end - 1), number);
      next = run.end;
    }
    EXPECT_EQ(next, elements(shape));
  }
  EXPECT_EQ(Blocks({3, 2000000}, 4).count(), 3) << "a row larger than a block is one";
  EXPECT_EQ(Blocks({0, 4}, 4).count(), 0);
}

TEST(Names, PathsAndBack) {
  for (const char* name : {"a", "lm_head.weight", "model.layers.0.mlp.experts.up_proj.weight"}) {
    EXPECT_EQ(name_of_path(hdf5_path(name)), name);
  }
  EXPECT_EQ(hdf5_path("model.norm.weight"), "/model/norm/weight");
  EXPECT_THROW(hdf5_path(std::string("a\0b", 3)), std::logic_error);
}

}  // namespace
}  // namespace upcycle
