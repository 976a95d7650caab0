// A checkpoint written on any number of ranks is the same global tensors, and every layout reads its own boxes of them. All content
// is a pure function of names and indices, so each run judges by itself: writing on n ranks is right, reading on n ranks is right,
// hence written on n and read on m is the same state.
#include "train/snapshot.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "base/error.hpp"
#include "model/stage.hpp"
#include "train/start.hpp"

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

// What tensor `name` holds in the test's state `kind` ("master", "exp_avg", ...).
void content(const std::string& kind, const ParameterSpec& spec, const Box& box, Tensor target) {
  ParameterSpec renamed = spec;
  renamed.name = kind + "/" + spec.name;
  renamed.role = Role::feed_forward;  // norms would be ones
  initialise(renamed, box, tiny(false), 7, target);
}

Tensor expected(const std::string& kind, const ParameterSpec& spec, const Box& box) {
  Tensor target = at::empty(box.size, at::kFloat);
  content(kind, spec, box, target);
  return target;
}

std::filesystem::path shared_directory(const Communicator& world) {
  char pattern[] = "/tmp/upcycle-snapshot-XXXXXX";
  return world.broadcast(world.rank() == 0 ? std::string(mkdtemp(pattern)) : std::string(), 0);
}

// The whole of a bucket in state `kind`, of which a rank may keep a part.
Tensor whole(const std::string& kind, Stage& stage, const Bucket& bucket) {
  Tensor flat = at::zeros({bucket.size});
  for (size_t i = 0; i < bucket.weights.size(); ++i) {
    const Weight& weight = stage.weights().all()[bucket.weights[i]];
    const Tensor view = flat.narrow(0, bucket.runs[i].begin, bucket.runs[i].size()).view(weight.shape);
    for (const Part& part : weight.parts) content(kind, part.spec, part.box, part.of(view));
  }
  return flat;
}

Tensor own(const std::string& kind, Stage& stage, const Bucket& bucket) {
  return whole(kind, stage, bucket).narrow(0, bucket.own.begin, bucket.own.size());
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
    const Mesh mesh(Grid(parallel, world_size()));
    const std::filesystem::path directory = shared_directory(mesh.world());

    Stage stage(architecture, Layout::even(mesh.grid(), architecture), mesh);
    stage.weights().allocate(compute, at::kCPU, parallel.zero);
    fill_masters(stage.weights(), [](const ParameterSpec& s, const Box& b, Tensor t) { content("master", s, b, t); });
    RunRecord record;
    record.run_id = "test";
    record.architecture = to_hf(architecture, nlohmann::json::object());
    record.run = nlohmann::json::object();
    const auto start = save_checkpoint(directory, mesh, stage.weights(), nullptr, {}, record);   // step 0: no optimizer yet
    Optimizer optimizer(stage.weights(), OptimizerSection{}, 1.0);
    for (size_t i = 0; i < stage.weights().buckets().size(); ++i) {
      optimizer.exp_avg(i).copy_(own("exp_avg", stage, stage.weights().buckets()[i]));
      optimizer.exp_avg_sq(i).copy_(own("exp_avg_sq", stage, stage.weights().buckets()[i]));
    }
    optimizer.updates().fill_(5.0);
    const auto folder = save_checkpoint(directory, mesh, stage.weights(), &optimizer, {7, 84, 2}, record);

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
        Tensor want = expected(kind, spec, box);
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
      const Mesh other_mesh(Grid(there, world_size()));
      Stage other(architecture, Layout::even(other_mesh.grid(), architecture), other_mesh);
      other.weights().allocate(compute, at::kCPU, there.zero);
      Optimizer other_optimizer(other.weights(), OptimizerSection{}, 1.0);
      const TrainingState state = restore_checkpoint(reader, other.weights(), &other_optimizer);
      EXPECT_EQ(state.step, 7);
      EXPECT_EQ(state.position, 84);
      EXPECT_EQ(state.skipped, 2);
      EXPECT_EQ(other_optimizer.updates().item<float>(), 5.0f);
      for (size_t i = 0; i < other.weights().buckets().size(); ++i) {
        const Bucket& bucket = other.weights().buckets()[i];
        EXPECT_TRUE(at::equal(bucket.values, whole("master", other, bucket).to(bucket.dtype)));
        EXPECT_TRUE(at::equal(bucket.masters, own("master", other, bucket)));
        EXPECT_TRUE(at::equal(other_optimizer.exp_avg(i), own("exp_avg", other, bucket)));
        EXPECT_TRUE(at::equal(other_optimizer.exp_avg_sq(i), own("exp_avg_sq", other, bucket)));
      }
    }
    mesh.world().barrier();
    if (mesh.world().rank() == 0) std::filesystem::remove_all(directory);
  }
}

INSTANTIATE_TEST_SUITE_P(All, Snapshot, testing::Values(std::tuple(Precision::bf16, true, 0), std::tuple(Precision::bf16, false, 1),
                                                        std::tuple(Precision::fp32, true, 2), std::tuple(Precision::fp32, false, 0)));

}  // namespace
}  // namespace upcycle
