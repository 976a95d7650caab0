// A checkpoint written on any number of ranks is the same global tensors, and every layout reads its own boxes of them. All content
// is a pure function of names and indices, so each run judges by itself: writing on n ranks is right, reading on n ranks is right,
// hence written on n and read on m is the same state.
#include "train/snapshot.hpp"

#include <gtest/gtest.h>

#include <cstdlib>

#include "support/known_state.hpp"
#include "support/save_checkpoint.hpp"

namespace upcycle {
namespace {

Architecture tiny(bool tied) {
  Architecture a;
  a.hidden = 32, a.layers = 3, a.heads = 4, a.kv_heads = 2, a.head_dim = 16, a.ffn = 64, a.vocab = 96;
  a.tied = tied;
  a.experts = 8, a.top_k = 2, a.expert_ffn = 24;
  a.dense_layers = {1};
  return a;
}

std::filesystem::path shared_directory(const Communicator& world) {
  char pattern[] = "/tmp/upcycle-snapshot-XXXXXX";
  return world.broadcast(world.rank() == 0 ? std::string(mkdtemp(pattern)) : std::string(), 0);
}

// All that the ranks of this test can be cut into, with and without ZeRO-1.
std::vector<ParallelSection> layouts() {
  std::vector<ParallelSection> out;
  for (int64_t tensor = 1; tensor <= 2; ++tensor) {
    for (int64_t pipeline = 1; pipeline <= 2; ++pipeline) {
      for (int64_t expert = 1; tensor * pipeline <= world_size() && expert <= world_size() / pipeline; expert *= 2) {
        for (const int64_t zero : {0, 1}) {
          ParallelSection parallel;
          parallel.tensor = tensor, parallel.pipeline = pipeline, parallel.expert = expert, parallel.zero = zero;
          out.push_back(parallel);
        }
      }
    }
  }
  return out;
}

class Snapshot : public testing::TestWithParam<std::tuple<Precision, bool, size_t>> {
 protected:
  // Many small buckets, so that parts begin and end in the middle of rows.
  void SetUp() override { bucket_elements = 3000; }
  void TearDown() override { bucket_elements = int64_t{1} << 25; }
};

TEST_P(Snapshot, IsTheSameGlobalTensorsOnAnyLayout) {
  const auto [precision, tied, turn] = GetParam();
  const at::ScalarType compute = precision == Precision::bf16 ? at::kBFloat16 : at::kFloat;
  const bool rounds = compute != at::kFloat;
  const Architecture architecture = tiny(tied);
  const std::vector<ParallelSection> all = layouts();
  // Of many layouts each is written by some of the model's variants; of few, by all.
  const size_t step = all.size() > 4 ? 3 : 1;
  for (size_t number = step > 1 ? turn : 0; number < all.size(); number += step) {
    const ParallelSection parallel = all[number];
    SCOPED_TRACE(text("tensor ", parallel.tensor, " pipeline ", parallel.pipeline, " expert ", parallel.expert, " zero ", parallel.zero));
    KnownState state(architecture, parallel, compute);
    const Mesh& mesh = state.mesh;
    const std::filesystem::path directory = shared_directory(mesh.world());
    const RunRecord record = known_record(architecture);
    state.fill();
    const auto start = save_checkpoint(directory, mesh, state.stage.weights(), nullptr, {}, record);   // step 0: no optimizer yet
    const auto folder = save_checkpoint(directory, mesh, state.stage.weights(), &*state.optimizer, {7, 84, 2}, record);

    // Written right: every global tensor, whole.
    const CheckpointReader reader(folder);
    const auto check = [&](const CheckpointReader& reader, const char* file, const std::string& kind, bool rounded) {
      for (const ParameterSpec& spec : catalogue(architecture)) {
        if (!reader.tensors(file).contains(spec.name)) {
          EXPECT_TRUE(std::string(file) == kMastersFile && (!rounded || spec.always_fp32())) << file << " lacks " << spec.name;
          continue;
        }
        const Box box = upcycle::whole(spec.shape);
        Tensor read = at::empty(spec.shape, at::kFloat);
        std::vector<Piece> piece = {{spec.name, spec.shape, box, read}};
        reader.fill(file, piece);
        Tensor want = known(kind, spec, box);
        if (std::string(file) == kWeightsFile && rounded && !spec.always_fp32()) want = want.to(compute).to(at::kFloat);
        EXPECT_TRUE(at::equal(read, want)) << file << " " << spec.name;
      }
    };
    for (const auto& written : {start, folder}) {
      check(CheckpointReader(written), kWeightsFile, "master", rounds);
      check(CheckpointReader(written), kMastersFile, "master", rounds);
      EXPECT_EQ(CheckpointReader(written).tensors(kMastersFile).empty(), !rounds);
    }
    check(reader, kFirstMomentsFile, "exp_avg", false);
    check(reader, kSecondMomentsFile, "exp_avg_sq", false);

    // Read right: into fresh weights of this layout, and of others.
    for (const size_t other_number : {number, (number + 1) % all.size(), (number + 3) % all.size()}) {
      const ParallelSection& there = all[other_number];
      SCOPED_TRACE(text("read on tensor ", there.tensor, " pipeline ", there.pipeline, " expert ", there.expert, " zero ", there.zero));
      KnownState other(architecture, there, compute);
      const TrainingState restored = other.restore(reader);
      EXPECT_EQ(restored.step, 7);
      EXPECT_EQ(restored.position, 84);
      EXPECT_EQ(restored.skipped, 2);
      other.expect_known();
    }
    mesh.world().barrier();
    if (mesh.world().rank() == 0) std::filesystem::remove_all(directory);
  }
}

INSTANTIATE_TEST_SUITE_P(All, Snapshot, testing::Values(std::tuple(Precision::bf16, true, 0), std::tuple(Precision::bf16, false, 1),
                                                        std::tuple(Precision::fp32, true, 2), std::tuple(Precision::fp32, false, 0)));

}  // namespace
}  // namespace upcycle
