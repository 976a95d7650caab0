// Written on one layout, read on another: random layouts of 1, 2, 4 and 8 ranks over every axis, with and without ZeRO-1, each reading what
// each number of ranks has left (CTest fixtures; the small ones come again after the large ones), every value bit for bit.
#include <gtest/gtest.h>

#include <iostream>
#include <random>

#include "parallel/every_layout.hpp"
#include "support/known_state.hpp"
#include "support/save_checkpoint.hpp"
#include "train/layout_check.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;

struct Model {
  const char* name;
  Architecture architecture;
  at::ScalarType compute;
};

// Dense, MoE, and mixed; tied and not; with masters and without.
std::vector<Model> models() {
  Architecture dense;
  dense.hidden = 32, dense.layers = 4, dense.heads = 4, dense.kv_heads = 2, dense.head_dim = 16, dense.ffn = 64, dense.vocab = 90, dense.tied = true;
  Architecture moe = dense;
  moe.experts = 8, moe.top_k = 2, moe.expert_ffn = 24, moe.tied = false;
  Architecture mixed = moe;
  mixed.dense_layers = {0, 3}, mixed.tied = true;
  return {{"dense", dense, at::kBFloat16}, {"moe", moe, at::kBFloat16}, {"mixed", mixed, at::kFloat}};
}

std::vector<ParallelSection> some_layouts(const Model& model, size_t most, unsigned seed) {
  std::vector<ParallelSection> all;
  for (const ParallelSection& layout : every_layout(world_size())) {
    RunConfig run;
    run.parallel = layout;
    run.train.sequence = 64, run.train.global_batch = 64;
    if (layout.pipeline * layout.virtual_stages <= model.architecture.layers && check_layout(run, model.architecture, world_size()).problems.empty()) {
      all.push_back(layout);
    }
  }
  std::shuffle(all.begin(), all.end(), std::mt19937(seed));
  all.resize(std::min(all.size(), most));
  return all;
}

TEST(Reshard, AnyLayoutReadsAnyOther) {
  bucket_elements = 3000;   // parts begin and end in the middle of rows
  const Communicator world = Communicator::everyone();
  const fs::path folder = fs::path(UPCYCLE_RESHARD_DIR) / text(world.size());
  const bool again = std::getenv("UPCYCLE_RESHARD_AGAIN");
  unsigned seed = static_cast<unsigned>(world.size()) + (again ? 100 : 0);
  int64_t written = 0, read = 0;
  world.together([&] {
    if (world.rank() != 0) return;
    fs::create_directories(folder);
    for (const auto& old : fs::directory_iterator(folder)) fs::remove_all(old.path());
  });
  for (const Model& model : models()) {
    const std::vector<ParallelSection> layouts = some_layouts(model, 3, ++seed);
    ASSERT_FALSE(layouts.empty());
    for (size_t i = 0; i < layouts.size(); ++i) {
      KnownState state(model.architecture, layouts[i], model.compute);
      state.fill();
      save_checkpoint(folder / text(model.name, '-', i), state.mesh, state.stage.weights(), &*state.optimizer, {7, 84, 2}, known_record(model.architecture));
      ++written;
    }
    std::vector<fs::path> there;
    for (const int ranks : {1, 2, 4, 8}) {
      for (size_t i = 0; i < 3; ++i) {
        const fs::path one = fs::path(UPCYCLE_RESHARD_DIR) / text(ranks) / text(model.name, '-', i) / step_directory(7);
        if (fs::exists(one / kManifestFile)) there.push_back(one);
      }
    }
    std::shuffle(there.begin(), there.end(), std::mt19937(seed));
    for (size_t i = 0; i < there.size() && i < 6; ++i) {
      const ParallelSection& layout = layouts[i % layouts.size()];
      SCOPED_TRACE(text(there[i].string(), " on tensor ", layout.tensor, " context ", layout.context, " pipeline ", layout.pipeline, " expert ", layout.expert,
                        " expert_tensor ", layout.expert_tensor, " zero ", layout.zero));
      KnownState state(model.architecture, layout, model.compute);
      const TrainingState restored = state.restore(CheckpointReader(there[i]));
      EXPECT_EQ(restored.position, 84);
      state.expect_known();
      ++read;
    }
  }
  world.barrier();
  if (world.rank() == 0) std::cout << text(world.size(), " ranks: ", written, " checkpoints written, ", read, " pairs of layouts read\n");
  EXPECT_GE(read, 3);
}

}  // namespace
}  // namespace upcycle
