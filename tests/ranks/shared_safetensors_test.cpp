// Several ranks write the files that one rank writes, and go on where an attempt stopped.
#include "checkpoint/shared_safetensors.hpp"

#include <ATen/ops/arange.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <optional>
#include <set>

#include "checkpoint/boxes.hpp"
#include "support/scratch.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;

constexpr uint64_t kShard = 3000;

struct Fixture {
  explicit Fixture(const Communicator& world) : world(world) {
    SharedSafetensors::block_bytes = 256;
    if (world.rank() == 0) own.emplace();
    root = world.broadcast(own ? own->path().string() : "", 0);
    const auto add = [&](const std::string& name, at::ScalarType dtype, const Shape& shape) {
      items.push_back({name, dtype, shape});
      values.push_back((at::arange(elements(shape), at::kFloat) * 0.37 + static_cast<double>(items.size())).reshape(shape).to(dtype));
    };
    add("odd", at::kBFloat16, {3});
    add("rows", at::kFloat, {9, 40});       // a block is a row
    add("wide", at::kBFloat16, {2, 300});   // and less than one
    add("empty", at::kHalf, {0, 4});
    add("scalar", at::kFloat, {});
    add("many", at::kHalf, {70, 7});
    if (world.rank() == 0) {
      SafetensorsWriter writer(root / "alone", items, kShard, {{"format", "pt"}});
      for (const Tensor& value : values) writer.write(value);
      writer.finish();
    }
    world.barrier();
  }
  ~Fixture() {
    SharedSafetensors::block_bytes = SharedSafetensors::kBlockBytes;
    world.barrier();
  }
  SharedSafetensors open(const std::string& identity = "us") {
    return SharedSafetensors(root / "together", items, kShard, {{"format", "pt"}}, world, identity);
  }
  /// All that is missing but the last `leave` blocks of each rank. How many blocks there were to write, on all ranks.
  int64_t write(SharedSafetensors& writer, size_t leave = 0) {
    const auto& blocks = writer.missing();
    const size_t count = blocks.size() - std::min(leave, blocks.size());
    for (size_t i = 0; i < count; ++i) writer.write(blocks[i], view_of(values[blocks[i].item], blocks[i].box).to(at::kFloat));
    return world.all_reduce(static_cast<int64_t>(blocks.size()), Reduce::sum);
  }
  /// On rank 0: every file is there, byte for byte, and nothing else.
  void expect_as_alone() {
    world.barrier();
    if (world.rank() != 0) return;
    std::set<std::string> expected, found;
    for (const auto& entry : fs::directory_iterator(root / "alone")) expected.insert(entry.path().filename());
    for (const auto& entry : fs::directory_iterator(root / "together")) found.insert(entry.path().filename());
    EXPECT_EQ(found, expected);
    for (const std::string& name : expected) EXPECT_EQ(contents(root / "together" / name), contents(root / "alone" / name)) << name;
  }
  /// By rank 0.
  void damage(const std::string& name, uint64_t offset, const std::string& bytes) {
    if (world.rank() == 0) {
      std::fstream file(root / "together" / name, std::ios::binary | std::ios::in | std::ios::out);
      file.seekp(static_cast<std::streamoff>(offset));
      file << bytes;
    }
    world.barrier();
  }

  const Communicator& world;
  std::optional<Scratch> own;
  fs::path root;
  std::vector<SafetensorsItem> items;
  std::vector<Tensor> values;
};

TEST(SharedSafetensors, TheSameBytesAsOneRankAlone) {
  const Communicator world = Communicator::everyone();
  Fixture f(world);
  SharedSafetensors writer = f.open();
  EXPECT_EQ(writer.found(), 0u);
  EXPECT_EQ(f.write(writer), 1 + 9 + 2 * 3 + 1 + 4);
  writer.finish();
  f.expect_as_alone();
}

TEST(SharedSafetensors, GoesOnWhereAnAttemptStopped) {
  const Communicator world = Communicator::everyone();
  Fixture f(world);
  int64_t all = 0;
  {
    SharedSafetensors first = f.open();
    all = f.write(first, /*leave=*/2);
    EXPECT_THROW(first.finish(), std::exception);
  }
  world.barrier();   // each rank's attempt ends with what it was given: nobody looks before
  {
    SharedSafetensors second = f.open();
    EXPECT_GT(second.found(), 0u);
    EXPECT_LT(second.found(), second.bytes());
    EXPECT_EQ(f.write(second), 2 * world.size());
    EXPECT_LT(2 * world.size(), all);
  }   // and stops again, with everything written but not finished
  world.barrier();
  SharedSafetensors third = f.open();
  EXPECT_EQ(third.found(), third.bytes());
  EXPECT_EQ(f.write(third), 0);
  third.finish();
  f.expect_as_alone();
}

TEST(SharedSafetensors, WhatIsNotAsNotedIsWrittenAgain) {
  const Communicator world = Communicator::everyone();
  Fixture f(world);
  std::string shard;
  {
    SharedSafetensors first = f.open();
    f.write(first);
  }
  const uint64_t size = world.rank() == 0 ? fs::file_size(f.root / "together/model-00001-of-00002.safetensors") : 0;
  f.damage("model-00001-of-00002.safetensors", size - 3, "x");        // in its last block
  f.damage(".resume.0", 24, "torn");                                  // the second note: block 1
  if (world.rank() == 0) std::ofstream(f.root / "together/.resume.0", std::ios::app | std::ios::binary) << "half a note";
  world.barrier();
  {
    SharedSafetensors second = f.open();
    EXPECT_EQ(f.write(second), 2);
  }
  SharedSafetensors third = f.open();   // what was noted behind the torn note counts
  EXPECT_EQ(third.found(), third.bytes());
  third.finish();
  f.expect_as_alone();
}

TEST(SharedSafetensors, AnotherIdentityStartsOver) {
  const Communicator world = Communicator::everyone();
  Fixture f(world);
  int64_t all = 0;
  {
    SharedSafetensors first = f.open();
    all = f.write(first);
  }
  {
    SharedSafetensors other = f.open("them");
    EXPECT_EQ(other.found(), 0u);
    EXPECT_EQ(f.write(other), all);
  }
  f.items.back().dtype = at::kBFloat16;   // and other headers
  SharedSafetensors last = f.open("them");
  EXPECT_EQ(last.found(), 0u);
  EXPECT_THROW(last.finish(), std::exception);
}

}  // namespace
}  // namespace upcycle
