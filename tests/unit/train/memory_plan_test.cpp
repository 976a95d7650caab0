#include "train/memory_plan.hpp"

#include <gtest/gtest.h>

#include <ctime>
#include <map>

#include "base/box.hpp"
#include "support/scratch.hpp"
#include "train/full_memory.hpp"
#include "train/layout_check.hpp"
#include "train/saved.hpp"
#include "train/target.hpp"
#include "train/traffic_plan.hpp"

namespace upcycle {
namespace {

Architecture small(int64_t experts) {
  Architecture a;
  a.hidden = 64, a.layers = 5, a.heads = 8, a.kv_heads = 2, a.head_dim = 16, a.ffn = 96, a.vocab = 500;
  if (experts > 0) a.experts = experts, a.top_k = 2, a.expert_ffn = 48, a.dense_layers = {0};
  return a;
}

RunConfig run_with(const ParallelSection& parallel, Precision precision = Precision::bf16) {
  RunConfig run;
  run.source.model = "m";
  run.parallel = parallel;
  run.train.precision = precision;
  run.train.sequence = 32;
  run.train.global_batch = 48;
  return run;
}

struct Case {
  ParallelSection parallel;
  int world;
};
const std::vector<Case> kLayouts = {{{}, 1},
                                    {{}, 4},
                                    {{.expert = 4}, 8},
                                    {{.tensor = 4, .pipeline = 2, .expert = 4}, 16},
                                    {{.tensor = 2, .context = 2, .pipeline = 5, .expert = 2, .expert_tensor = 2}, 40}};

// Every element of the model is in exactly as many boxes as the layout says there are holders; summed over distinct
// boxes it is there once.
TEST(MemoryPlan, BoxesOverDistinctCoordinatesAddUpToTheModel) {
  for (const bool tied : {false, true}) {
    for (const Case& c : kLayouts) {
      Architecture a = small(8);
      a.tied = tied;
      const Layout layout = Layout::even(Grid(c.parallel, c.world), a);
      int64_t total = 0;
      for (const ParameterSpec& spec : catalogue(a)) {
        std::set<Shape> corners;
        for (int rank = 0; rank < c.world; ++rank) {
          const auto box = local_box(spec, layout, layout.grid.at(rank));
          if (box && corners.insert(box->begin).second) total += elements(*box);
        }
      }
      EXPECT_EQ(total, count_parameters(a).total) << c.world << " ranks";
    }
  }
}

// Where nothing is replicated inside a replica group, the planner's parameters over all ranks are the model times its
// copies.
TEST(MemoryPlan, ParametersOfAllRanksAreTheModelTimesItsCopies) {
  const Architecture a = small(8);
  int64_t expert_parameters = 0;
  for (const ParameterSpec& spec : catalogue(a))
    expert_parameters += spec.role == Role::expert ? elements(spec.shape) : 0;
  const int64_t other = count_parameters(a).total - expert_parameters;
  for (const Case& c : {kLayouts[0], kLayouts[1], kLayouts[2], Case{{.pipeline = 5, .expert = 2}, 20}}) {
    const Layout layout = Layout::even(Grid(c.parallel, c.world), a);
    int64_t sum = 0;
    for (int rank = 0; rank < c.world; ++rank) sum += rank_memory(a, run_with(c.parallel), layout, rank).parameters;
    EXPECT_EQ(sum, expert_parameters * layout.grid.size(Axis::expert_data) + other * layout.grid.size(Axis::replica));
  }
}

TEST(MemoryPlan, BytesFollowFromTheDtypes) {
  const Architecture a = small(8);
  const Layout one = Layout::even(Grid({}, 1), a);
  int64_t routers = 0;
  for (const ParameterSpec& spec : catalogue(a)) routers += spec.always_fp32() ? elements(spec.shape) : 0;
  const int64_t all = count_parameters(a).total;
  ASSERT_GT(routers, 0);

  const RankMemory bf16 = rank_memory(a, run_with({}), one, 0);
  EXPECT_EQ(bf16.parameters, all);
  EXPECT_EQ(bf16.weights, 2 * (all - routers) + 4 * routers);
  EXPECT_EQ(bf16.masters, 4 * (all - routers));
  EXPECT_EQ(bf16.gradients, 4 * all);
  EXPECT_EQ(bf16.moments, 8 * all);

  const RankMemory fp32 = rank_memory(a, run_with({}, Precision::fp32), one, 0);
  EXPECT_EQ(fp32.weights, 4 * all);
  EXPECT_EQ(fp32.masters, 0) << "the weights are their own masters";
  EXPECT_EQ(fp32.tensors(), fp32.weights + fp32.gradients + fp32.moments + fp32.activations + fp32.buffers);
  EXPECT_EQ(fp32.total(), fp32.tensors() + RankMemory::kLibraries);
}

TEST(MemoryPlan, ZeroCutsMastersAndMomentsOverTheReplicas) {
  const Architecture a = small(0);
  const Layout layout = Layout::even(Grid({}, 4), a);
  RunConfig run = run_with({});
  run.parallel.zero = 0;
  const RankMemory whole = rank_memory(a, run, layout, 0);
  run.parallel.zero = 1;
  const RankMemory cut = rank_memory(a, run, layout, 0);
  EXPECT_EQ(cut.gradients, whole.gradients);
  EXPECT_NEAR(static_cast<double>(cut.moments), static_cast<double>(whole.moments) / 4, 8.0 * 4 * 100);
  EXPECT_NEAR(static_cast<double>(cut.masters), static_cast<double>(whole.masters) / 4, 4.0 * 4 * 100);
}

TEST(MemoryPlan, OneLargestRankForEveryStage) {
  const Architecture a = small(8);
  const ParallelSection parallel{.tensor = 2, .pipeline = 2, .expert = 4};
  const Layout layout = Layout::even(Grid(parallel, 8), a);
  const RunConfig run = run_with(parallel);
  const std::vector<RankMemory> stages = plan_memory(a, run, layout);
  ASSERT_EQ(stages.size(), 2u);
  for (int rank = 0; rank < 8; ++rank) {
    const RankMemory memory = rank_memory(a, run, layout, rank);
    EXPECT_LE(memory.parameters, stages.at(static_cast<size_t>(memory.stage)).parameters);
  }
  EXPECT_EQ(layout.grid.at(stages[1].rank)[Axis::pipeline], 1);
}

TEST(MemoryPlan, ActivationsGrowAsTheyShould) {
  const Architecture a = small(8);
  const Layout one = Layout::even(Grid({}, 1), a);
  RunConfig run = run_with({});
  const auto memory = [&](const Layout& layout, int rank) { return rank_memory(a, run, layout, rank); };
  const int64_t base = memory(one, 0).activations;
  run.train.micro_batch = 4;
  EXPECT_EQ(memory(one, 0).activations, 4 * base);
  const int64_t none = memory(one, 0).buffers;
  run.train.recompute = Recompute::selective;
  const int64_t selective = memory(one, 0).activations;
  run.train.recompute = Recompute::full;
  EXPECT_LT(selective, 4 * base);
  EXPECT_LT(memory(one, 0).activations, selective);
  EXPECT_GE(memory(one, 0).buffers, none) << "a layer that is computed anew needs room, too";

  run = run_with({.tensor = 2});
  const int64_t halves = memory(Layout::even(Grid(run.parallel, 2), a), 0).activations;
  EXPECT_LT(halves, base);
  EXPECT_GT(halves, base / 2) << "attention and the head see all rows of the micro-batch";
  run = run_with({.context = 2});
  EXPECT_LT(memory(Layout::even(Grid(run.parallel, 2), a), 0).activations, base);
}

TEST(MemoryPlan, EarlyStagesKeepMoreMicroBatches) {
  const Architecture a = small(8);
  RunConfig run = run_with({.pipeline = 5});
  const Layout layout = Layout::even(Grid(run.parallel, 5), a);
  const auto in_flight = [&](int stage) { return rank_memory(a, run, layout, stage).in_flight; };
  for (int stage = 0; stage < 5; ++stage) EXPECT_EQ(in_flight(stage), 5 - stage);
  run.train.global_batch = 3;
  for (int stage = 0; stage < 5; ++stage) EXPECT_EQ(in_flight(stage), std::min(3, 5 - stage)) << "no more than there are";
}

// Megatron's interleaved order keeps 2 (p - 1 - s) + (v - 1) p + 1 chunks.
TEST(MemoryPlan, InterleavedStagesKeepMoreOfSmallerChunks) {
  Architecture a = small(8);
  a.layers = 8;
  RunConfig run = run_with({.pipeline = 4, .virtual_stages = 2});
  const Grid grid(run.parallel, 4);
  for (int stage = 0; stage < 4; ++stage) {
    EXPECT_EQ(rank_memory(a, run, make_layout(a, grid, run.parallel), stage).in_flight, (2 * (3 - stage) + 4 + 1) / 2.0) << stage;
  }
}

// What each backward keeps of a layer, per token, counted by hand for bf16: hidden 64, 8 query and 2 key heads of 16, experts of 48.
TEST(MemoryPlan, WhatBackwardKeepsOfALayer) {
  const Architecture a = small(8);
  RunConfig run = run_with({});
  const int64_t tokens = run.train.sequence;
  const int64_t attention = 2 * (64 + 64 + 192 + 160 + 128 + 64) + 4 * (1 + 8 + 1);
  EXPECT_EQ(saved_bytes(saved_by_layer(a, run, Grid({}, 1), 0), Recompute::none), tokens * (attention + 2 * (64 + 3 * 96)));
  const int64_t moe = 2 * 64 + 4 * (8 + 1) + 2 * (3 * 8 + 2 * 4) + 2 * 2 * 3 * 48 + 2 * 4;   // the rows are copied again
  EXPECT_EQ(saved_bytes(saved_by_layer(a, run, Grid({}, 1), 1), Recompute::none), tokens * (attention + moe));
  EXPECT_EQ(saved_bytes(saved_by_layer(a, run, Grid({}, 1), 1), Recompute::full), tokens * (2 * 64 + 4 + 2 * (3 * 8 + 2 * 4)));
}

// The head keeps no logits: its input, 1 / rms and the gradient that forward found. On the way a chunk of logits, and the norm.
TEST(MemoryPlan, TheHeadsLogitsAreAChunk) {
  const Architecture a = small(8);
  RunConfig run = run_with({});
  const int64_t tokens = run.train.sequence;
  EXPECT_EQ(saved_bytes(saved_by_head(a, run, Grid({}, 1)), Recompute::full), tokens * (2 * 64 + 4 + 2 * 64));
  EXPECT_EQ(passing_in_head(a, run, Grid({}, 1)), tokens * (2 * 64 + 2 * 500));
  Architecture large = a;
  large.vocab = 151936;
  for (const int64_t sequence : {4096, 65536}) {
    run.train.sequence = sequence;
    const int64_t logits = passing_in_head(large, run, Grid({}, 1)) - sequence * 2 * 64;
    EXPECT_LE(logits, int64_t{1} << 30);
    EXPECT_GE(logits, int64_t{512} << 20);
  }
}

TEST(TrafficPlan, BytesByHand) {
  const Architecture a = small(8);   // 5 layers, the first dense; hidden 64
  RunConfig run = run_with({.tensor = 2, .pipeline = 5, .expert = 4});
  const Layout layout = Layout::even(Grid(run.parallel, 20), a);   // data 2
  const int64_t micro_batches = 24, row = 2 * 64, own = 16;
  ASSERT_EQ(micro_batches_of_rank(run, layout.grid), micro_batches);
  std::map<std::string, Traffic> by_name;
  for (const Traffic& t : plan_traffic(a, run, layout)) by_name.emplace(std::string(name(t.axis)) + ": " + t.what, t);
  const auto sent = [&](const char* what) { return by_name.at(what); };

  const Traffic tensor = sent("tensor: activations, around attention, feed-forwards and the ends");
  EXPECT_EQ(tensor.forward, micro_batches * own * row * 5) << "the dense layer's stage: 2 + 2, and the embedding's scatter";
  EXPECT_EQ(tensor.backward, tensor.forward);
  const Traffic pipeline = sent("pipeline: activations to the next stage, their gradients back");
  EXPECT_EQ(pipeline.forward, micro_batches * own * row);
  EXPECT_EQ(pipeline.backward, micro_batches * own * row);
  const Traffic experts = sent("expert: tokens to their experts");
  EXPECT_EQ(experts.forward, micro_batches * own * row * 2 * 3 / 4) << "top-2, three of four go away";
  EXPECT_EQ(experts.backward, experts.forward);
  EXPECT_EQ(by_name.count("context: keys and values, their gradients back"), 0u);
  EXPECT_EQ(by_name.count("expert_data: experts' parameters, their gradients"), 0u) << "4 experts' ranks are the whole stage";

  run.train.recompute = Recompute::full;
  by_name.clear();
  for (const Traffic& t : plan_traffic(a, run, layout)) by_name.emplace(std::string(name(t.axis)) + ": " + t.what, t);
  EXPECT_EQ(sent("expert: tokens to their experts").backward, 2 * experts.backward) << "forward's messages once more";
}

TEST(TrafficPlan, DispatchersByHand) {
  const Architecture a = small(8);   // 4 layers of experts, top-2
  RunConfig run = run_with({.expert = 2, .expert_tensor = 2});
  const Layout layout = Layout::even(Grid(run.parallel, 4), a);   // data 4
  const int64_t rows = 12 * 32 * 4, row = 64;   // micro-batches x sequence x layers; numbers of a row
  const auto traffic = [&] {
    std::map<std::string, Traffic> by_name;
    for (const Traffic& t : plan_traffic(a, run, layout)) by_name.emplace(t.what, t);
    return by_name;
  };
  run.moe.dispatcher = Dispatch::all_to_all;
  EXPECT_EQ(traffic().at("tokens to their experts").forward, rows * row * 2 * 2 / 2) << "bf16, top-2, half of them go away";
  run.balance.capacity_factor = 1.5, run.balance.pad_to_capacity = true;
  EXPECT_EQ(traffic().at("tokens to their experts").forward, rows * row * 2 * 2 / 2 * 3 / 2) << "padded to a capacity of 1.5";
  run.moe.dispatcher = Dispatch::all_gather;
  EXPECT_EQ(traffic().at("all tokens to all ranks").forward, rows * row * 2 * 3) << "bf16, to the three others";
  EXPECT_EQ(traffic().at("sums of the experts' answers back").forward, rows * row * 4 * 3) << "fp32";
  EXPECT_EQ(traffic().count("tokens to their experts"), 0u);
}

TEST(TrafficPlan, GradientsAndParameters) {
  const Architecture a = small(0);
  RunConfig run = run_with({.zero = 0}, Precision::fp32);
  const Layout layout = Layout::even(Grid({}, 4), a);
  const int64_t all = count_parameters(a).total;
  const auto dense = [&] { return plan_traffic(a, run, layout).at(0); };
  EXPECT_EQ(dense().backward, 2 * 4 * all * 3 / 4) << "an all-reduce";
  EXPECT_EQ(dense().forward, 0);
  run.parallel.zero = 1;
  EXPECT_EQ(dense().backward, 4 * all * 3 / 4) << "a reduce-scatter";
  EXPECT_EQ(dense().forward, 4 * all * 3 / 4) << "an all-gather";
  run.train.precision = Precision::bf16;
  EXPECT_EQ(dense().forward, 2 * all * 3 / 4);
}

TEST(TrafficPlan, Bubble) {
  RunConfig run = run_with({.pipeline = 4});
  run.train.global_batch = 16;
  EXPECT_DOUBLE_EQ(pipeline_bubble(run, Grid(run.parallel, 4)), 3.0 / 16);
  run.parallel.virtual_stages = 2;
  EXPECT_DOUBLE_EQ(pipeline_bubble(run, Grid(run.parallel, 4)), 3.0 / 32);
  EXPECT_DOUBLE_EQ(pipeline_bubble(run_with({}), Grid({}, 1)), 0.0);
}

// The largest models on many ranks are planned while one waits.
TEST(MemoryPlan, IsQuick) {
  Architecture a = small(64);
  a.layers = 40;
  const RunConfig run = run_with({.tensor = 4, .pipeline = 8, .expert = 16});
  const Layout layout = Layout::even(Grid(run.parallel, 1024), a);
  const std::clock_t before = std::clock();
  EXPECT_EQ(plan_memory(a, run, layout).size(), 8u);
  EXPECT_FALSE(plan_traffic(a, run, layout).empty());
  EXPECT_GT(count_parameters(a).total, 0);
  EXPECT_LT(static_cast<double>(std::clock() - before) / CLOCKS_PER_SEC, 1.0);
}

TEST(LayoutCheck, SmallestWorld) {
  EXPECT_EQ(smallest_world({}), 1);
  EXPECT_EQ(smallest_world({.pipeline = 4, .expert = 8}), 32);
  EXPECT_EQ(smallest_world({.tensor = 4, .pipeline = 2, .expert = 2}), 8) << "experts fold into the tensor axis";
  EXPECT_EQ(smallest_world({.tensor = 4, .context = 3, .expert = 8}), 24);
  for (const ParallelSection& p :
       {ParallelSection{.tensor = 6, .expert = 4}, ParallelSection{.context = 2, .expert = 3, .expert_tensor = 2}}) {
    const auto world = static_cast<int>(smallest_world(p));
    EXPECT_NO_THROW(Grid(p, world));
    for (int fewer = 1; fewer < world; ++fewer) EXPECT_THROW(Grid(p, fewer), UserError) << fewer;
  }
}

TEST(LayoutCheck, NamesEverythingThatDoesNotDivide) {
  const Architecture a = small(8);
  RunConfig run = run_with({.tensor = 3, .expert = 3});
  run.train.global_batch = 5;
  run.train.sequence = 32;
  const LayoutCheck check = check_layout(run, a, 6);
  ASSERT_EQ(check.problems.size(), 3u);
  EXPECT_NE(check.problems[0].find("tensor = 3 does not divide num_attention_heads = 8: 2 or 4 would"), std::string::npos);
  EXPECT_NE(check.problems[1].find(
                "train.global_batch = 5 is not a multiple of train.micro_batch = 1 times the 2 data-parallel ranks"),
            std::string::npos);
  EXPECT_NE(check.problems[1].find("4 or 6 would do"), std::string::npos);
  EXPECT_EQ(check.problems[2], "train.sequence = 32 is not a multiple of 3 (tensor 3): 30 or 33 would be");

  run = run_with({.expert = 3});
  const LayoutCheck no_grid = check_layout(run, a, 4);
  EXPECT_FALSE(no_grid.grid.has_value());
  EXPECT_NE(no_grid.problems.at(0).find("expert 3 does not divide the 4 ranks of a stage (tensor 1 x context 1 x data 4): 2 or 4 would"), std::string::npos);

  run = run_with({.context = 3, .pipeline = 2, .virtual_stages = 3});
  const LayoutCheck late = check_layout(run, a, 6);
  ASSERT_EQ(late.problems.size(), 2u);
  EXPECT_NE(late.problems[0].find("pipeline = 2 x virtual_stages = 3 makes 6 chunks for num_hidden_layers = 5"), std::string::npos);
  EXPECT_NE(late.problems[0].find("5 is the most"), std::string::npos);
  EXPECT_NE(late.problems[1].find("is not a multiple of 6 (tensor 1 x 2 x context 3): 30 or 36 would be"), std::string::npos);
  EXPECT_TRUE(check_layout(run_with({.expert = 4}), a, 4).problems.empty());
}

TEST(Target, TheSourceAsItIsOrItsMixture) {
  const Architecture dense = small(0), mixture = small(8);
  RunConfig run = run_with({});
  EXPECT_EQ(choose_target(run, dense, true).architecture, dense);
  EXPECT_EQ(choose_target(run, mixture, true).architecture, mixture);

  run.moe.experts = 8;
  const Target grown = choose_target(run, dense, true);
  EXPECT_EQ(grown.architecture.experts, 8);
  EXPECT_EQ(grown.recipe.value().copies, 8);
  const Target random = choose_target(run, dense, false);
  EXPECT_EQ(random.architecture, grown.architecture);
  EXPECT_FALSE(random.recipe.has_value());

  EXPECT_EQ(choose_target(run, mixture, true).architecture, mixture) << "[moe] agrees";
  run.moe.top_k = 4;
  EXPECT_NE(user_error([&] {
              choose_target(run, mixture, true);
            }).find("a mixture of 8 experts, top-2, but [moe] asks for experts = 8, top_k = 4"),
            std::string::npos);
  run.moe = {};
  run.moe.max_parameters = 1000;
  EXPECT_NE(user_error([&] { choose_target(run, dense, true); }).find("more than moe.max_parameters = 1000"),
            std::string::npos);
}

TEST(FullMemory, SaysWhatWasPlannedAndWhatTakesLess) {
  const Architecture a = small(8);
  RunConfig run = run_with({});
  run.train.sequence = 4096, run.train.micro_batch = 4;
  const Layout layout = Layout::even(Grid({}, 1), a);
  const auto planned = [&](const RunConfig& config) { return rank_memory(a, config, layout, 0).total(); };
  const auto in_words = [](int64_t bytes) {
    char text[32];
    std::snprintf(text, sizeof text, "%.1f GB", static_cast<double>(bytes) * 1e-9);
    return std::string(text);
  };
  RunConfig full = run, half = run;
  full.train.recompute = Recompute::full, half.train.micro_batch = 2;
  ASSERT_NE(in_words(planned(full)), in_words(planned(run)));
  const int64_t between = (planned(full) + planned(half)) / 2;   // full recomputation would fit, half a micro-batch would not
  ASSERT_LT(planned(full), planned(half));
  const std::string said = memory_is_full(a, run, layout, 0, between, "CUDA out of memory. Tried to allocate 1 GiB.\nException raised from");
  EXPECT_NE(said.find("full (" + in_words(between) + "): CUDA out of memory. Tried to allocate 1 GiB.\n"), std::string::npos) << said;
  EXPECT_NE(said.find("planned for this rank: " + in_words(planned(run)) + " = weights "), std::string::npos) << said;
  EXPECT_NE(said.find("train.recompute = \"full\": " + in_words(planned(full)) + "\n"), std::string::npos) << said;
  EXPECT_NE(said.find("train.micro_batch = 2: " + in_words(planned(half)) + ", still too much"), std::string::npos) << said;
  EXPECT_EQ(said.find("out of balance"), std::string::npos) << said;
  // Nothing smaller is offered that the run has already, and a plan that fits is not blamed.
  full.train.micro_batch = 1;
  const std::string smallest = memory_is_full(a, full, layout, 0, planned(full) + 1, "full");
  EXPECT_EQ(smallest.find("train."), std::string::npos) << smallest;
  EXPECT_NE(smallest.find("out of balance"), std::string::npos) << smallest;
}

}  // namespace
}  // namespace upcycle
