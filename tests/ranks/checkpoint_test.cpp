#include <ATen/ops/arange.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>
#include <cstdlib>
#include <optional>

#include "checkpoint/digest.hpp"
#include "checkpoint/reader.hpp"
#include "checkpoint/boxes.hpp"
#include "checkpoint/writer.hpp"
#include "support/scratch.hpp"
#include "support/tensors.hpp"

namespace upcycle {
namespace {

using testing::HasSubstr;
namespace fs = std::filesystem;

/// A directory that all ranks of `world` see, removed with the last rank's use of it.
class SharedScratch {
 public:
  explicit SharedScratch(const Communicator& world) : world_(world) {
    if (world.rank() == 0) own_.emplace();
    path_ = world.broadcast(own_ ? own_->path().string() : "", 0);
  }
  ~SharedScratch() { world_.barrier(); }
  fs::path operator/(const std::string& name) const { return path_ / name; }
  const fs::path& path() const { return path_; }

 private:
  const Communicator& world_;
  std::optional<Scratch> own_;
  fs::path path_;
};

/// Bits that differ everywhere, NaNs and infinities of bfloat16 among them.
Tensor values(const Shape& shape, at::ScalarType dtype, int64_t salt) {
  const Tensor counted = at::arange(elements(shape), at::kLong) * 2654435761 + salt;
  if (dtype == at::kLong) return counted.reshape(shape);
  if (dtype == at::kBFloat16) return counted.to(at::kShort).view(at::kBFloat16).reshape(shape);
  return counted.to(at::kInt).view(at::kFloat).reshape(shape);
}

struct Named {
  std::string name;
  Tensor value;
};
std::vector<Named> model() {
  return {{"model.embed_tokens.weight", values({48, 40}, at::kBFloat16, 1)},
          {"model.layers.0.mlp.experts.up_proj.weight", values({8, 24, 36}, at::kBFloat16, 2)},
          {"model.layers.0.mlp.gate.weight", values({8, 36}, at::kFloat, 3)},
          {"model.layers.1.mlp.down_proj.weight", values({64, 256, 12}, at::kFloat, 4)},
          {"model.norm.weight", values({40}, at::kBFloat16, 5)},
          {"counters", values({12}, at::kLong, 6)},
          {"scalar", values({}, at::kFloat, 7)}};
}

/// Part `rank` of `ranks` of a tensor, cut along dim `dim` as evenly as it goes; scalars belong to rank 0.
std::optional<Box> part_of(const Shape& shape, size_t dim, int rank, int ranks) {
  Box box = whole(shape);
  if (shape.empty()) return rank == 0 ? std::optional(box) : std::nullopt;
  dim %= shape.size();
  box.begin[dim] = shape[dim] * rank / ranks;
  box.size[dim] = shape[dim] * (rank + 1) / ranks - box.begin[dim];
  return box;
}

/// This rank's pieces, every tensor cut along another dim: rows, columns, experts. Every second one is a strided view.
std::vector<Piece> pieces_of(const std::vector<Named>& tensors, const Communicator& world, size_t first_dim) {
  std::vector<Piece> pieces;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Shape shape = tensors[i].value.sizes().vec();
    const auto box = part_of(shape, first_dim + i, world.rank(), world.size());
    if (!box) continue;
    const Tensor part = view_of(tensors[i].value, *box);
    pieces.push_back({tensors[i].name, shape, *box, i % 2 ? part : part.contiguous()});
  }
  return pieces;
}

void write_checkpoint(const fs::path& folder, const Communicator& world, size_t first_dim) {
  CheckpointWriter writer(folder, world);
  writer.add(kWeightsFile, pieces_of(model(), world, first_dim));
  writer.add_text("note.txt", world.rank() == 0 ? "rank 0's words" : "not these");
  writer.commit({.run_id = "test", .step = 1});
}

TEST(Checkpoint, TheSameBytesFromAnyNumberOfRanks) {
  const Communicator world = Communicator::everyone();
  const SharedScratch scratch(world);
  std::vector<fs::path> written;
  for (int ranks = 1; ranks <= world.size(); ranks *= 2) {
    const Communicator some = world.split(world.rank() < ranks ? 0 : 1, world.rank());
    for (const size_t first_dim : {0, 1}) {
      written.push_back(scratch / text(ranks, "-ranks-cut-", first_dim));
      if (world.rank() < ranks) write_checkpoint(written.back(), some, first_dim);
    }
  }
  world.barrier();
  for (const fs::path& folder : written) {
    for (const char* file : {kWeightsFile, "note.txt", kManifestFile}) {
      EXPECT_TRUE(contents(folder / file) == contents(written[0] / file)) << folder << ' ' << file;
    }
  }
  EXPECT_EQ(contents(written[0] / "note.txt"), "rank 0's words");
  EXPECT_EQ(digest_of_tensors(read_manifest(written.back()).tensors), digest_of_tensors(read_manifest(written[0]).tensors));
}

TEST(Checkpoint, AnyLayoutReadsAnyOther) {
  const Communicator world = Communicator::everyone();
  const SharedScratch scratch(world);
  write_checkpoint(scratch / "step-00000001", world, 0);
  const CheckpointReader reader(scratch / "step-00000001");
  for (int ranks = 1; ranks <= 5; ++ranks) {
    for (const size_t dim : {0, 1, 2}) {
      for (const auto& [name, value] : model()) {
        const Shape shape = value.sizes().vec();
        const auto box = part_of(shape, dim, world.rank() % ranks, ranks);
        if (!box) continue;
        Piece piece{name, shape, *box, at::empty(box->size, value.scalar_type())};
        reader.fill(kWeightsFile, std::span(&piece, 1));
        ASSERT_TRUE(same_bits(piece.local, view_of(value, *box))) << name << ' ' << describe(*box);
      }
    }
  }
}

TEST(Checkpoint, BoxesThatDoNotTileAreAnErrorOnAllRanks) {
  const Communicator world = Communicator::everyone();
  const SharedScratch scratch(world);
  const auto attempt = [&](const std::vector<Piece>& pieces) -> std::string {
    try {
      CheckpointWriter writer(scratch / "step-00000001", world);
      writer.add(kWeightsFile, pieces);
    } catch (const UserError&) {
      return "the user's error";
    } catch (const std::exception& error) {
      return error.what();
    }
    return "";
  };
  const Piece all{"w", {8}, whole({8}), at::zeros({8})};
  const Piece half{"w", {8}, {{0}, {4}}, at::zeros({4})};
  const Piece misshapen{"w", {8}, whole({8}), at::zeros({4})};
  const bool last = world.rank() == world.size() - 1;
  EXPECT_THAT(attempt(last ? std::vector{half} : std::vector<Piece>{}),
              HasSubstr("tensor 'w' [8]: all ranks' boxes cover 4 of 8"));
  if (world.size() > 1) EXPECT_THAT(attempt({last ? all : half}), HasSubstr("overlap"));
  EXPECT_THAT(attempt({last ? misshapen : all}), HasSubstr("a piece of shape [4]"));
  world.barrier();
  EXPECT_TRUE(fs::is_empty(scratch.path()));
}

/// Lets this process's files grow to `bytes` only, while it lives; a write beyond fails, as on a full disk.
class FileSizeLimit {
 public:
  explicit FileSizeLimit(rlim_t bytes) {
    std::signal(SIGXFSZ, SIG_IGN);
    getrlimit(RLIMIT_FSIZE, &before_);
    const struct rlimit small { std::min(bytes, before_.rlim_max), before_.rlim_max };
    setrlimit(RLIMIT_FSIZE, &small);
  }
  ~FileSizeLimit() { setrlimit(RLIMIT_FSIZE, &before_); }

 private:
  struct rlimit before_ {};
};

TEST(Checkpoint, ADiskThatFillsOnOneRankIsEverybodysErrorAndNothingElseIsLost) {
  const Communicator world = Communicator::everyone();
  const SharedScratch scratch(world);
  write_checkpoint(scratch / "step-00000001", world, 0);
  const std::string before = digest_of_tensors(read_manifest(scratch / "step-00000001").tensors);
  world.barrier();
  for (int failing = 0; failing < world.size(); ++failing) {
    std::string message;
    {
      std::optional<FileSizeLimit> limit;
      // Rank 0 fails when it reserves the space, the others when they write beyond the limit.
      if (world.rank() == failing) limit.emplace(4096);
      message = user_error([&] { write_checkpoint(scratch / "step-00000002", world, 0); });
    }
    EXPECT_THAT(message, testing::AllOf(HasSubstr("step-00000002.partial/weights.h5"),
                                        HasSubstr("File too large")))
        << "rank " << failing << " fails";
    world.barrier();
    EXPECT_FALSE(fs::exists(scratch / "step-00000002"));
    EXPECT_FALSE(fs::exists(scratch / "step-00000002.partial"));
    EXPECT_EQ(digest_of_tensors(read_manifest(scratch / "step-00000001").tensors), before);
    world.barrier();
  }
  write_checkpoint(scratch / "step-00000002", world, 0);
  EXPECT_EQ(digest_of_tensors(read_manifest(scratch / "step-00000002").tensors), before);
}

TEST(Checkpoint, H5pyAndH5dumpReadIt) {
  const Communicator world = Communicator::everyone();
  const SharedScratch scratch(world);
  const Shape shape{256, 256};
  const Tensor patterns = at::arange(65536, at::kInt).to(at::kShort).view(at::kBFloat16).reshape(shape);
  const Box box = *part_of(shape, 1, world.rank(), world.size());
  CheckpointWriter writer(scratch / "step-00000001", world);
  writer.add(kWeightsFile, std::vector<Piece>{{"all.bfloat16", shape, box, view_of(patterns, box)}});
  writer.commit({.step = 1});
  if (world.rank() == 0) {
    const std::string check = text(UPCYCLE_PYTHON, " ", UPCYCLE_SOURCE_DIR, "/tests/ranks/read_bfloat16.py ",
                                   scratch / "step-00000001" / kWeightsFile);
    EXPECT_EQ(std::system(check.c_str()), 0) << check;
  }
}

}  // namespace
}  // namespace upcycle
