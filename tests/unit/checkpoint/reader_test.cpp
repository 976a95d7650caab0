#include "checkpoint/reader.hpp"

#include <ATen/Parallel.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "checkpoint/digest.hpp"
#include "checkpoint/writer.hpp"
#include "support/scratch.hpp"
#include "support/tensors.hpp"

namespace upcycle {
namespace {

using testing::HasSubstr;
namespace fs = std::filesystem;

Piece all_of(const std::string& name, const Tensor& value) {
  return {name, value.sizes().vec(), whole(value.sizes().vec()), value};
}

fs::path write(const fs::path& folder, const std::vector<Piece>& pieces) {
  const Communicator alone;
  CheckpointWriter writer(folder, alone);
  writer.add(kWeightsFile, pieces);
  writer.commit({.step = 1});
  return folder;
}

Tensor read_all(const CheckpointReader& reader, const std::string& name, at::ScalarType dtype) {
  const Shape shape = reader.tensors(kWeightsFile).at(name).shape;
  Piece piece = all_of(name, at::zeros(shape, dtype));
  reader.fill(kWeightsFile, std::span(&piece, 1));
  return piece.local;
}

TEST(Reader, GivesBackEveryDtypeAndShape) {
  const Scratch scratch;
  const std::vector<Piece> pieces = {all_of("float", at::randn({3, 5})),
                                     all_of("brain", at::randn({4, 2, 3}).to(at::kBFloat16)),
                                     all_of("whole", at::arange(7, at::kLong)),
                                     all_of("scalar", at::full({}, 2.5)),
                                     all_of("none", at::zeros({0, 3})),
                                     all_of("a.b.c", at::randn({2})),
                                     all_of("a.b.d", at::randn({1}))};
  const CheckpointReader reader(write(scratch / "step-00000001", pieces));
  EXPECT_EQ(reader.tensor_files(), std::vector<std::string>{kWeightsFile});
  EXPECT_EQ(reader.tensors(kWeightsFile).size(), pieces.size());
  for (const Piece& piece : pieces) {
    const StoredTensor& stored = reader.tensors(kWeightsFile).at(piece.name);
    EXPECT_EQ(stored.shape, piece.shape);
    EXPECT_EQ(stored.dtype, piece.local.scalar_type());
    EXPECT_TRUE(same_bits(read_all(reader, piece.name, stored.dtype), piece.local)) << piece.name;
  }
  EXPECT_EQ(reader.manifest().tensors[kWeightsFile]["count"], pieces.size());
  EXPECT_EQ(reader.manifest().tensors[kWeightsFile]["bytes"], 15 * 4 + 24 * 2 + 7 * 8 + 4 + 3 * 4);
  EXPECT_TRUE(reader.tensors(kMastersFile).empty());
}

TEST(Reader, KeepsAllBfloat16PatternsAndRoundsTiesToEven) {
  const Scratch scratch;
  const Tensor patterns = at::arange(65536, at::kInt).to(at::kShort).view(at::kBFloat16);
  // 1 + 2^-8 and 1 + 3*2^-8 lie halfway between bfloat16 neighbours: down to 1, up to 1 + 2^-6.
  const Tensor ties = at::tensor({1.00390625, 1.01171875, -1.00390625}, at::kFloat);
  const CheckpointReader reader(write(scratch / "step-00000001", {all_of("patterns", patterns), all_of("ties", ties)}));
  EXPECT_TRUE(same_bits(read_all(reader, "patterns", at::kBFloat16), patterns));
  EXPECT_TRUE(
      at::equal(read_all(reader, "ties", at::kBFloat16).to(at::kFloat), at::tensor({1.0, 1.015625, -1.0}, at::kFloat)));
  EXPECT_TRUE(
      same_bits(read_all(reader, "patterns", at::kFloat).view(at::kInt), patterns.to(at::kFloat).view(at::kInt)));
}

TEST(Reader, FillsStridedViewsWithBoxes) {
  const Scratch scratch;
  const Tensor value = at::randn({6, 8, 10});
  // Stored from a transposed view, too.
  const CheckpointReader reader(
      write(scratch / "step-00000001", {all_of("w", value.permute({2, 0, 1}).contiguous().permute({1, 2, 0}))}));
  const Box box{{1, 2, 3}, {4, 5, 6}};
  Tensor host = at::full({6, 5, 9}, -1.0);
  Piece piece{"w", {6, 8, 10}, box, host.permute({2, 1, 0}).narrow(0, 2, 4)};
  reader.fill(kWeightsFile, std::span(&piece, 1));
  EXPECT_TRUE(at::equal(piece.local, value.narrow(0, 1, 4).narrow(1, 2, 5).narrow(2, 3, 6)));
  EXPECT_EQ((host == -1.0).sum().item<int64_t>(), 6 * 5 * 5) << "nothing beside the view is touched";
}

TEST(Reader, LargeTensorsGoInPieces) {
  const Scratch scratch;
  const Tensor value = at::arange(9'000'000, at::kFloat).reshape({3000, 3000});  // 36 MB: more than one slab
  const CheckpointReader reader(write(scratch / "step-00000001", {all_of("w", value.t())}));
  EXPECT_TRUE(at::equal(read_all(reader, "w", at::kFloat), value.t()));
}

// However many blocks are on their way at a time, each lands where it belongs, whole blocks and parts of them, and damage is told of the first.
TEST(Reader, AnyNumberOfThreadsReadsTheSame) {
  const Scratch scratch;
  const Tensor value = at::randn({16 * 1024, 1024});   // 67 MB: 16 blocks
  const fs::path step = write(scratch / "step-00000001", {all_of("w", value)});
  const int before = at::get_num_threads();
  for (const bool damaged : {false, true}) {
    if (damaged) {
      std::string file = contents(step / kWeightsFile);
      const size_t data = file.find(std::string(static_cast<const char*>(value.const_data_ptr()), 64));
      for (const int64_t row : {5000, 9000, 15000}) file[data + 4 * 1024 * row] ^= 1;
      store(step / kWeightsFile, file);
    }
    const CheckpointReader reader(step);
    for (const int threads : {1, 3, 8}) {
      at::set_num_threads(threads);
      for (int again = 0; again < 3; ++again) {
        const std::string complaint = user_error([&] {
          EXPECT_TRUE(at::equal(read_all(reader, "w", at::kFloat), value));
          EXPECT_TRUE(at::equal(read_all(reader, "w", at::kBFloat16), value.to(at::kBFloat16))) << "through memory that is lent";
        });
        if (!damaged) EXPECT_EQ(complaint, "");
        if (damaged) EXPECT_THAT(complaint, HasSubstr(text("elements ", 4 * 1024 * 1024, " to ", 5 * 1024 * 1024 - 1)));
      }
    }
  }
  at::set_num_threads(before);
}

TEST(Reader, RefusesWhatDisagrees) {
  const Scratch scratch;
  const fs::path step =
      write(scratch / "step-00000001", {all_of("w", at::ones({2, 3})), all_of("n", at::zeros({2}, at::kLong))});
  const CheckpointReader reader(step);
  const auto message = [&](const std::string& file, Piece piece) {
    return user_error([&] { reader.fill(file, std::span(&piece, 1)); });
  };
  EXPECT_THAT(message(kMastersFile, all_of("w", at::ones({2, 3}))), HasSubstr("has no masters.h5"));
  EXPECT_THAT(message(kWeightsFile, all_of("v", at::ones({2, 3}))), HasSubstr("weights.h5: tensor 'v' is not there"));
  EXPECT_THAT(message(kWeightsFile, all_of("w.x", at::ones({2, 3}))), HasSubstr("tensor 'w.x'"));
  EXPECT_THAT(message(kWeightsFile, all_of("w", at::ones({3, 2}))),
              HasSubstr("tensor 'w': has shape [2, 3], but [3, 2] is wanted"));
  EXPECT_THAT(message(kWeightsFile, all_of("n", at::ones({2}))), HasSubstr("holds Long, but Float is wanted"));
  Piece outside{"w", {2, 3}, {{1, 0}, {2, 3}}, at::ones({2, 3})};
  EXPECT_THROW(reader.fill(kWeightsFile, std::span(&outside, 1)), std::logic_error);
  Piece small{"w", {2, 3}, {{0, 0}, {2, 3}}, at::ones({2, 2})};
  EXPECT_THROW(reader.fill(kWeightsFile, std::span(&small, 1)), std::logic_error);
}

TEST(Reader, RefusesDamagedFiles) {
  const Scratch scratch;
  const fs::path step = write(scratch / "step-00000001", {all_of("w", at::ones({200, 300}))});
  const fs::path file = step / kWeightsFile;
  const std::string good = contents(file);
  store(file, std::string(good.size(), 'x'));
  EXPECT_THAT(user_error([&] { CheckpointReader{step}; }),
              testing::AllOf(HasSubstr(file.string()), HasSubstr("signature")));
  store(file, good.substr(0, good.size() - 1));
  EXPECT_THAT(user_error([&] { CheckpointReader{step}; }), HasSubstr("but the manifest says"));
  store(file, good);
  EXPECT_EQ(user_error([&] { CheckpointReader{step}; }), "");
}

TEST(Writer, IsWholeOrAbsent) {
  const Scratch scratch;
  const Communicator alone;
  const fs::path step = scratch / "step-00000001";
  fs::create_directories(step.string() + ".partial/left by a killed writer");
  {
    CheckpointWriter writer(step, alone);
    EXPECT_FALSE(fs::exists(step.string() + ".partial/left by a killed writer"));
    writer.add_text("a.txt", "a");
    EXPECT_THROW(writer.add_text("a.txt", "b"), std::logic_error);
    EXPECT_THROW(writer.add("a.txt", {}), std::logic_error);
    EXPECT_FALSE(fs::exists(step));
  }
  EXPECT_TRUE(fs::is_empty(scratch.path())) << "an uncommitted writer leaves nothing";

  write(step, {all_of("w", at::ones({2}))});
  EXPECT_THAT(user_error([&] { CheckpointWriter(step, alone); }), HasSubstr("this checkpoint exists"));
  EXPECT_THAT(user_error([&] { CheckpointWriter(store(scratch / "file", "") / "step-00000001", alone); }),
              HasSubstr("creating"));
  EXPECT_THROW(write(scratch / "step-00000002", {all_of("w", at::ones({2}, at::kDouble))}), std::logic_error);
  EXPECT_FALSE(fs::exists(scratch / "step-00000002.partial"));

  // A damaged checkpoint in the way is kept under another name.
  fs::resize_file(step / kWeightsFile, 10);
  write(step, {all_of("w", at::zeros({2}))});
  EXPECT_EQ(fs::file_size(scratch.path() / "step-00000001.damaged-1" / kWeightsFile), 10u);
  EXPECT_EQ(newest_checkpoint(scratch.path()), step);
}

// A flipped bit anywhere in a file of tensors is an error or changes nothing that is read: values are never wrong without a word.
TEST(Reader, NoFlippedBitReachesAValue) {
  const Scratch scratch;
  const Tensor matrix = at::randn({40, 33}), list = at::randn({9});
  const fs::path step = write(scratch / "step-00000001", {all_of("model.layers.3.mlp.up.weight", matrix), all_of("model.norm.weight", list)});
  const std::string good = contents(step / kWeightsFile);
  const size_t data = good.find(std::string(static_cast<const char*>(matrix.const_data_ptr()), 64));
  ASSERT_NE(data, std::string::npos);
  int refused = 0, harmless = 0;
  const auto flip = [&](size_t byte) {
    std::string bad = good;
    bad[byte] = static_cast<char>(bad[byte] ^ 0x10);
    store(step / kWeightsFile, bad);
    return user_error([&] {
      const CheckpointReader reader(step);
      EXPECT_TRUE(same_bits(read_all(reader, "model.layers.3.mlp.up.weight", at::kFloat), matrix)) << byte;
      EXPECT_TRUE(same_bits(read_all(reader, "model.norm.weight", at::kFloat), list)) << byte;
    });
  };
  size_t next = 0;
  for (size_t byte = 0; byte < good.size(); ++byte) {   // all that is not zero but for values, of which some will do; some zeros
    const bool value = byte >= data && byte < data + matrix.nbytes() + list.nbytes();
    if (good[byte] && !value ? false : byte < next) continue;
    next = byte + (value ? 61 : 4099);
    ++(flip(byte).empty() ? harmless : refused);
  }
  EXPECT_GT(refused, 400) << harmless;
  EXPECT_THAT(flip(data + 5), testing::AllOf(HasSubstr("tensor 'model.layers.3.mlp.up.weight' (layer 3), elements 0 to 1319"),
                                             HasSubstr(text("bytes ", data, " to ", data + 40 * 33 * 4 - 1, " of")), HasSubstr("are not what was written")));
}

TEST(Reader, ADamagedBlockIsNobodysBusinessWhoDoesNotReadIt) {
  const Scratch scratch;
  const Tensor value = at::randn({3000, 1024});   // 12 MB: three blocks
  const fs::path step = write(scratch / "step-00000001", {all_of("w", value)});
  std::string file = contents(step / kWeightsFile);
  const size_t data = file.find(std::string(static_cast<const char*>(value.const_data_ptr()), 64));
  file[data + 4 * 1024 * 1500] ^= 1;
  store(step / kWeightsFile, file);
  const CheckpointReader reader(step);
  const auto rows = [&](int64_t begin, int64_t size) {
    Piece piece{"w", {3000, 1024}, {{begin, 0}, {size, 1024}}, at::empty({size, 1024})};
    reader.fill(kWeightsFile, std::span(&piece, 1));
    return at::equal(piece.local, value.narrow(0, begin, size));
  };
  EXPECT_TRUE(rows(0, 1024));
  EXPECT_TRUE(rows(2048, 952));
  EXPECT_THROW(rows(1000, 100), DamagedCheckpoint);
  EXPECT_EQ(reader.block(kWeightsFile, "w", 0).complaint, "");
  EXPECT_NE(reader.block(kWeightsFile, "w", 1).complaint, "");
  EXPECT_EQ(reader.checksums(kWeightsFile, "w").size(), 3u);
}

TEST(Digest, SeesNamesDtypesShapesAndBits) {
  const Scratch scratch;
  int number = 0;
  const auto written = [&](const std::vector<Piece>& pieces) {
    return digest_of_tensors(CheckpointReader(write(scratch / step_directory(++number), pieces)).manifest().tensors);
  };
  const Tensor zero = at::zeros({2, 3});
  const std::string base = written({all_of("w", zero), all_of("v", at::ones({1}))});
  EXPECT_EQ(base.size(), 32u);
  EXPECT_EQ(base, written({all_of("v", at::ones({1})), all_of("w", zero.clone())}));
  EXPECT_NE(base, written({all_of("w", -zero), all_of("v", at::ones({1}))})) << "-0 is another bit pattern";
  EXPECT_NE(base, written({all_of("w", at::zeros({3, 2})), all_of("v", at::ones({1}))}));
  EXPECT_NE(base, written({all_of("w", at::zeros({2, 3}, at::kBFloat16)), all_of("v", at::ones({1}))}));
  EXPECT_NE(base, written({all_of("u", zero), all_of("v", at::ones({1}))}));
}

}  // namespace
}  // namespace upcycle
