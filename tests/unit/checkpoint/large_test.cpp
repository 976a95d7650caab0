// One tensor with more elements than an int can count, and thousands of tensors with hardly any.
#include <ATen/ops/arange.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>
#include <linux/magic.h>
#include <sys/vfs.h>

#include <ctime>

#include "base/quantities.hpp"
#include "checkpoint/reader.hpp"
#include "checkpoint/writer.hpp"
#include "device/device.hpp"
#include "support/scratch.hpp"
#include "support/tensors.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;

void write(const fs::path& folder, const std::vector<Piece>& pieces) {
  const Communicator alone;
  CheckpointWriter writer(folder, alone);
  writer.add(kWeightsFile, pieces);
  writer.commit({.step = 1});
}

/// Why the directory of temporary files can't take so many bytes; "" when it can.
std::string no_room_for(uint64_t bytes) {
  const fs::path place = fs::temp_directory_path();
  struct statfs system {};
  if (::statfs(place.c_str(), &system) != 0) return "nobody knows what " + place.string() + " is";
  if (system.f_type == TMPFS_MAGIC) return place.string() + " is memory: TMPDIR names another directory";
  const uint64_t free = fs::space(place).available;
  return free < bytes ? text(place.string(), " has ", gigabytes(free), " free, ", gigabytes(bytes), " are wanted: TMPDIR names another directory") : "";
}

TEST(Large, ATensorOfMoreThan2To31Elements) {
  const Shape shape{5, 32768, 16384};
  const auto bytes = static_cast<uint64_t>(2 * elements(shape));
  if (const std::string why = no_room_for(2 * bytes); !why.empty()) GTEST_SKIP() << why;
  const Scratch scratch;
  // Each row is the one before, moved by one: they differ everywhere, and take 360 KB together.
  const Tensor few = at::randn({5 * 32768 + 16384 - 1}).to(at::kBFloat16);
  const Tensor value = few.as_strided(shape, {32768, 1, 1});
  const int64_t peak = device::memory(c10::Device(c10::kCPU)).peak;
  write(scratch / "step-00000001", {{"w", shape, whole(shape), value}});

  const CheckpointReader reader(scratch / "step-00000001");
  EXPECT_EQ(reader.manifest().tensors[kWeightsFile]["bytes"], bytes);
  EXPECT_EQ(reader.blocks(kWeightsFile, "w"), 1280);
  struct Rows {
    int64_t expert, first, count;
  };
  // Element 2^31 is the first of the last expert.
  for (const auto& [expert, first, count] : {Rows{0, 0, 3}, Rows{3, 32765, 3}, Rows{4, 0, 200}, Rows{4, 32768 - 130, 130}}) {
    Piece piece{"w", shape, {{expert, first, 0}, {1, count, 16384}}, at::zeros({1, count, 16384}, at::kBFloat16)};
    reader.fill(kWeightsFile, std::span(&piece, 1));
    EXPECT_TRUE(same_bits(piece.local, value.narrow(0, expert, 1).narrow(1, first, count))) << "expert " << expert << ", row " << first;
  }
  EXPECT_LT(device::memory(c10::Device(c10::kCPU)).peak, peak + (int64_t{256} << 20));
}

// Each costs a part of a millisecond, whether there are a few or thousands.
TEST(Large, ThousandsOfSmallTensors) {
  const Scratch scratch;
  const Tensor values = at::arange(6000 * 16, at::kFloat).reshape({6000, 16});
  std::vector<Piece> pieces;
  for (int64_t i = 0; i < values.size(0); ++i) {   // half of them in groups of ten, half in one
    const std::string name = i % 2 == 0 ? text("model.layers.", i / 20, ".norm_", i % 20, ".weight") : text("model.all.", i);
    pieces.push_back({name, {16}, whole({16}), values[i]});
  }
  const std::clock_t start = std::clock();   // of this process alone, however busy the machine is
  write(scratch / "step-00000001", pieces);
  const CheckpointReader reader(scratch / "step-00000001");
  EXPECT_EQ(reader.tensors(kWeightsFile).size(), pieces.size());
  const Tensor read = at::zeros({6000, 16});
  for (int64_t i = 0; i < values.size(0); ++i) pieces[static_cast<size_t>(i)].local = read[i];
  reader.fill(kWeightsFile, pieces);
  const double seconds = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
  EXPECT_TRUE(same_bits(read, values));
  EXPECT_LT(seconds, 8.0);
}

}  // namespace
}  // namespace upcycle
