// A checkpoint written on any number of ranks is the same global tensors, and every layout reads its own boxes of them. All content
// is a pure function of names and indices, so each run judges by itself: writing on n ranks is right, reading on n ranks is right,
// hence written on n and read on m is the same state.
#include "train/snapshot.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <gtest/gtest.h>

#include <cstdlib>

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

class Snapshot : public testing::TestWithParam<std::tuple<Precision, bool>> {};

TEST_P(Snapshot, IsTheSameGlobalTensorsOnAnyLayout) {
  const auto [precision, tied] = GetParam();
  const at::ScalarType compute = precision == Precision::bf16 ? at::kBFloat16 : at::kFloat;
  const Architecture architecture = tiny(tied);
  for (int64_t expert = 1; expert <= world_size(); expert *= 2) {
    ParallelSection parallel;
    parallel.expert = expert;
    const Mesh mesh(Grid(parallel, world_size()));
    const std::filesystem::path directory = shared_directory(mesh.world());

    Stage stage(architecture, Layout::even(mesh.grid(), architecture), mesh);
    stage.weights().allocate(compute, at::kCPU);
    fill_masters(stage.weights(), [](const ParameterSpec& s, const Box& b, Tensor t) { content("master", s, b, t); });
    Optimizer optimizer(stage.weights(), OptimizerSection{}, 1.0);
    for (size_t i = 0; i < stage.weights().all().size(); ++i) {
      for (const Part& part : stage.weights().all()[i].parts) {
        content("exp_avg", part.spec, part.box, part.of(optimizer.exp_avg(i)));
        content("exp_avg_sq", part.spec, part.box, part.of(optimizer.exp_avg_sq(i)));
      }
    }
    optimizer.updates().fill_(5.0);
    RunRecord record;
    record.run_id = "test";
    record.architecture = to_hf(architecture, nlohmann::json::object());
    record.run = nlohmann::json::object();
    const auto folder = save_checkpoint(directory, mesh, stage.weights(), &optimizer, {7, 84, 2}, record);

    // Written right: every global tensor, whole.
    const CheckpointReader reader(folder);
    const auto check = [&](const char* file, const std::string& kind, bool rounded) {
      for (const ParameterSpec& spec : catalogue(architecture)) {
        if (!reader.tensors(file).contains(spec.name)) {
          EXPECT_TRUE(std::string(file) == kMastersFile && (!rounded || spec.always_fp32())) << file << " lacks " << spec.name;
          continue;
        }
        const Box box = whole(spec.shape);
        Tensor read = at::empty(spec.shape, at::kFloat);
        std::vector<Piece> piece = {{spec.name, spec.shape, box, read}};
        reader.fill(file, piece);
        Tensor want = expected(kind, spec, box);
        if (std::string(file) == kWeightsFile && rounded && !spec.always_fp32()) want = want.to(compute).to(at::kFloat);
        EXPECT_TRUE(at::equal(read, want)) << file << " " << spec.name;
      }
    };
    const bool rounds = compute != at::kFloat;
    check(kWeightsFile, "master", rounds);
    check(kMastersFile, "master", rounds);
    check(kFirstMomentsFile, "exp_avg", false);
    check(kSecondMomentsFile, "exp_avg_sq", false);
    EXPECT_EQ(reader.tensors(kMastersFile).empty(), !rounds);

    // Read right: into fresh weights of this layout.
    Stage other(architecture, Layout::even(mesh.grid(), architecture), mesh);
    other.weights().allocate(compute, at::kCPU);
    Optimizer other_optimizer(other.weights(), OptimizerSection{}, 1.0);
    const TrainingState state = restore_checkpoint(reader, other.weights(), &other_optimizer);
    EXPECT_EQ(state.step, 7);
    EXPECT_EQ(state.position, 84);
    EXPECT_EQ(state.skipped, 2);
    EXPECT_EQ(other_optimizer.updates().item<float>(), 5.0f);
    for (size_t i = 0; i < other.weights().all().size(); ++i) {
      EXPECT_TRUE(at::equal(other.weights().all()[i].parameter.master, stage.weights().all()[i].parameter.master));
      EXPECT_TRUE(at::equal(other.weights().all()[i].parameter.value, stage.weights().all()[i].parameter.value));
      EXPECT_TRUE(at::equal(other_optimizer.exp_avg(i), optimizer.exp_avg(i)));
      EXPECT_TRUE(at::equal(other_optimizer.exp_avg_sq(i), optimizer.exp_avg_sq(i)));
    }
    mesh.world().barrier();
    if (mesh.world().rank() == 0) std::filesystem::remove_all(directory);
  }
}

INSTANTIATE_TEST_SUITE_P(All, Snapshot, testing::Combine(testing::Values(Precision::bf16, Precision::fp32), testing::Bool()));

}  // namespace
}  // namespace upcycle
