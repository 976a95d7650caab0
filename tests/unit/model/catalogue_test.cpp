#include "model/catalogue.hpp"

#include <gtest/gtest.h>

#include <map>
#include <set>

#include "base/error.hpp"

namespace upcycle {
namespace {

Architecture qwen3(int64_t hidden, int64_t layers, int64_t heads, int64_t kv, int64_t ffn, bool tied) {
  Architecture a;
  a.hidden = hidden, a.layers = layers, a.heads = heads, a.kv_heads = kv, a.head_dim = 128, a.ffn = ffn, a.vocab = 151936;
  a.tied = tied;
  return a;
}

/// Qwen3's own models, as their config.json files give them.
const Architecture k06B = qwen3(1024, 28, 16, 8, 3072, true), k17B = qwen3(2048, 28, 16, 8, 6144, true),
                   k4B = qwen3(2560, 36, 32, 8, 9728, true), k8B = qwen3(4096, 36, 32, 8, 12288, false),
                   k14B = qwen3(5120, 40, 40, 8, 17408, false), k32B = qwen3(5120, 64, 64, 8, 25600, false);

Architecture with_experts(Architecture a, int64_t experts, int64_t top_k, int64_t expert_ffn) {
  a.experts = experts, a.top_k = top_k, a.expert_ffn = expert_ffn;
  return a;
}

/// Small, awkward numbers: a vocabulary that nothing divides, head_dim != hidden / heads, two of five layers dense.
Architecture small() {
  Architecture a;
  a.hidden = 24, a.layers = 5, a.heads = 8, a.kv_heads = 2, a.head_dim = 4, a.ffn = 48, a.vocab = 101, a.tied = true;
  a.experts = 12, a.top_k = 4, a.expert_ffn = 8, a.dense_layers = {0, 3};
  return a;
}

TEST(Catalogue, CountsQwen3sOwnModels) {
  EXPECT_EQ(count_parameters(k06B).total, 596'049'920);
  EXPECT_EQ(count_parameters(k17B).total, 1'720'574'976);
  EXPECT_EQ(count_parameters(k4B).total, 4'022'468'096);
  EXPECT_EQ(count_parameters(k8B).total, 8'190'735'360);
  EXPECT_EQ(count_parameters(k14B).total, 14'768'307'200);
  EXPECT_EQ(count_parameters(k32B).total, 32'762'123'264);
  EXPECT_EQ(count_parameters(k14B).active, 14'768'307'200);

  const ParameterCount a3b = count_parameters(with_experts(qwen3(2048, 48, 32, 4, 6144, false), 128, 8, 768));
  EXPECT_NEAR(static_cast<double>(a3b.total), 30.532e9, 0.001e9);
  EXPECT_NEAR(static_cast<double>(a3b.active), 3.35e9, 0.005e9);
}

TEST(Catalogue, CountsUpcycledModels) {
  const ParameterCount granular = count_parameters(with_experts(k14B, 64, 8, 17408 / 8));
  EXPECT_NEAR(static_cast<double>(granular.total), 89.65e9, 0.005e9);
  EXPECT_NEAR(static_cast<double>(granular.active), 14.78e9, 0.005e9);
  EXPECT_NEAR(static_cast<double>(count_parameters(with_experts(k14B, 64, 8, 17408)).total), 688.6e9, 0.05e9);
  const ParameterCount copies = count_parameters(with_experts(k17B, 8, 2, 6144));
  EXPECT_NEAR(static_cast<double>(copies.total), 9.12e9, 0.005e9);
  EXPECT_NEAR(static_cast<double>(copies.active), 2.78e9, 0.005e9);
}

TEST(Catalogue, NamesAreHuggingFacesInForwardOrder) {
  Architecture a = small();
  a.layers = 2;
  a.tied = false;
  std::vector<std::string> names;
  for (const ParameterSpec& spec : catalogue(a)) names.push_back(spec.name);
  const std::string one = "model.layers.0.", two = "model.layers.1.";
  EXPECT_EQ(names, (std::vector<std::string>{
      "model.embed_tokens.weight", one + "input_layernorm.weight", one + "self_attn.q_proj.weight",
      one + "self_attn.k_proj.weight", one + "self_attn.v_proj.weight", one + "self_attn.q_norm.weight",
      one + "self_attn.k_norm.weight", one + "self_attn.o_proj.weight", one + "post_attention_layernorm.weight",
      one + "mlp.gate_proj.weight", one + "mlp.up_proj.weight", one + "mlp.down_proj.weight",
      two + "input_layernorm.weight", two + "self_attn.q_proj.weight", two + "self_attn.k_proj.weight",
      two + "self_attn.v_proj.weight", two + "self_attn.q_norm.weight", two + "self_attn.k_norm.weight",
      two + "self_attn.o_proj.weight", two + "post_attention_layernorm.weight", two + "mlp.gate.weight",
      two + "mlp.experts.gate_proj.weight", two + "mlp.experts.up_proj.weight", two + "mlp.experts.down_proj.weight",
      "model.norm.weight", "lm_head.weight"}));
  EXPECT_EQ(catalogue(k06B).size(), 28u * 11 + 2);
  EXPECT_EQ(catalogue(k8B).size(), 36u * 11 + 3);
}

TEST(Catalogue, SaysWhoDecays) {
  for (const ParameterSpec& spec : catalogue(small())) {
    const bool norm = spec.name.find("norm") != std::string::npos;
    EXPECT_EQ(spec.decays(), !norm) << spec.name;
    EXPECT_EQ(spec.always_fp32(), spec.name.ends_with("mlp.gate.weight")) << spec.name;
    EXPECT_EQ(spec.residual, spec.name.ends_with("o_proj.weight") || spec.name.ends_with("down_proj.weight")) << spec.name;
    EXPECT_EQ(spec.layer, spec.name.starts_with("model.layers.") ? spec.name[13] - '0' : -1) << spec.name;
  }
}

TEST(Catalogue, FindNamesWhatItMisses) {
  const auto specs = catalogue(small());
  EXPECT_EQ(find(specs, "model.norm.weight").shape, Shape{24});
  EXPECT_THROW(find(specs, "model.normal.weight"), std::out_of_range);
}

bool overlap(const Box& a, const Box& b) {
  for (size_t d = 0; d < a.begin.size(); ++d) {
    if (a.begin[d] + a.size[d] <= b.begin[d] || b.begin[d] + b.size[d] <= a.begin[d]) return false;
  }
  return true;
}

/// Over all ranks: every parameter's distinct boxes lie inside it, do not overlap and cover it.
void expect_partition(const Architecture& a, const ParallelSection& parallel, int world) {
  const Grid grid(parallel, world);
  check_divides(a, grid);
  const Layout layout = Layout::even(grid, a);
  ASSERT_EQ(layout.chunk_of_layer.size(), static_cast<size_t>(a.layers));
  int64_t total = 0;
  for (const ParameterSpec& spec : catalogue(a)) {
    std::set<std::pair<Shape, Shape>> distinct;
    for (int rank = 0; rank < world; ++rank) {
      const std::optional<Box> box = local_box(spec, layout, grid.at(rank));
      if (box && elements(*box) > 0) distinct.insert({box->begin, box->size});
    }
    std::vector<Box> boxes;
    for (const auto& [begin, size] : distinct) boxes.push_back({begin, size});
    for (size_t i = 0; i < boxes.size(); ++i) {
      ASSERT_TRUE(inside(boxes[i], spec.shape)) << spec.name << " " << describe(boxes[i]);
      total += elements(boxes[i]);
      for (size_t j = 0; j < i; ++j) ASSERT_FALSE(overlap(boxes[i], boxes[j])) << spec.name << " world " << world;
    }
  }
  EXPECT_EQ(total, count_parameters(a).total) << "world " << world;
}

TEST(LocalBox, EveryGridPartitionsEveryParameter) {
  int grids = 0;
  for (const int64_t tp : {1, 2, 4, 8}) {
    for (const int64_t cp : {1, 2}) {
      for (const int64_t pp : {1, 2, 5}) {
        for (const int64_t ep : {1, 2, 3, 4, 12}) {
          for (const int64_t etp : {1, 2}) {
            for (const int64_t dp : {1, 6}) {
              const int64_t stage = tp * cp * dp;
              if (stage % (ep * etp) != 0) continue;
              ParallelSection parallel;
              parallel.tensor = tp, parallel.context = cp, parallel.pipeline = pp, parallel.expert = ep, parallel.expert_tensor = etp;
              expect_partition(small(), parallel, static_cast<int>(stage * pp));
              ++grids;
            }
          }
        }
      }
    }
  }
  EXPECT_GT(grids, 150);
}

TEST(LocalBox, FourThousandRanks) {
  ParallelSection parallel;
  parallel.tensor = 8, parallel.pipeline = 8, parallel.expert = 64;
  const Architecture a = with_experts(k14B, 64, 8, 17408 / 8);
  const Grid grid(parallel, 4096);
  const Layout layout = Layout::even(grid, a);
  const auto specs = catalogue(a);
  // One replica of each stage holds the model once.
  std::map<std::string, std::set<Shape>> begins;
  for (int rank = 0; rank < 4096; ++rank) {
    if (grid.at(rank)[Axis::replica] == 0 || grid.at(rank)[Axis::expert_data] == 0) {
      for (const ParameterSpec* spec : {&find(specs, "model.layers.39.mlp.experts.up_proj.weight"), &find(specs, "lm_head.weight"),
                                        &find(specs, "model.layers.0.self_attn.k_proj.weight")}) {
        const auto box = local_box(*spec, layout, grid.at(rank));
        if (box) begins[spec->name].insert(box->begin);
      }
    }
  }
  EXPECT_EQ(begins["model.layers.39.mlp.experts.up_proj.weight"].size(), 64u);
  EXPECT_EQ(begins["lm_head.weight"].size(), 8u);
  EXPECT_EQ(begins["model.layers.0.self_attn.k_proj.weight"].size(), 8u);
}

TEST(LocalBox, FewerKvHeadsThanTensorRanksAreReplicated) {
  ParallelSection parallel;
  parallel.tensor = 8;
  const Grid grid(parallel, 8);
  const Layout layout = Layout::even(grid, small());
  const auto specs = catalogue(small());
  for (int rank = 0; rank < 8; ++rank) {
    const Coordinates here = grid.at(rank);
    // 2 KV heads of width 4 on 8 ranks: ranks 0-3 hold head 0, which their query head attends to; 4-7 hold head 1.
    EXPECT_EQ(local_box(find(specs, "model.layers.0.self_attn.k_proj.weight"), layout, here), (Box{{rank / 4 * 4, 0}, {4, 24}}));
    EXPECT_EQ(local_box(find(specs, "model.layers.0.self_attn.q_proj.weight"), layout, here), (Box{{rank * 4, 0}, {4, 24}}));
    EXPECT_EQ(local_box(find(specs, "model.layers.0.self_attn.o_proj.weight"), layout, here), (Box{{0, rank * 4}, {24, 4}}));
    // 101 rows on 8 ranks: 12 or 13 each.
    constexpr int64_t begin[] = {0, 12, 25, 37, 50, 63, 75, 88, 101};
    EXPECT_EQ(local_box(specs.front(), layout, here), (Box{{begin[rank], 0}, {begin[rank + 1] - begin[rank], 24}}));
  }
}

TEST(LocalBox, StagesOwnTheirLayersAndTheEnds) {
  ParallelSection parallel;
  parallel.pipeline = 2;
  for (const bool tied : {true, false}) {
    Architecture a = small();
    a.tied = tied;
    const Grid grid(parallel, 2);
    const Layout layout = Layout::even(grid, a);
    EXPECT_EQ(layout.chunk_of_layer, (std::vector<int>{0, 0, 0, 1, 1}));
    const auto specs = catalogue(a);
    const auto on = [&](const std::string& name, int stage) { return local_box(find(specs, name), layout, grid.at(stage)).has_value(); };
    EXPECT_TRUE(on("model.embed_tokens.weight", 0));
    EXPECT_EQ(on("model.embed_tokens.weight", 1), tied);
    EXPECT_FALSE(on("model.norm.weight", 0));
    EXPECT_TRUE(on("model.norm.weight", 1));
    EXPECT_TRUE(on("model.layers.2.mlp.gate.weight", 0));
    EXPECT_FALSE(on("model.layers.2.mlp.gate.weight", 1));
    EXPECT_TRUE(on("model.layers.3.mlp.down_proj.weight", 1));
    if (!tied) EXPECT_TRUE(on("lm_head.weight", 1) && !on("lm_head.weight", 0));
  }
}

void expect_complaint(const Architecture& a, const ParallelSection& parallel, int world, const std::vector<std::string>& words) {
  try {
    check_divides(a, Grid(parallel, world));
    FAIL() << "nothing was said about " << words.front();
  } catch (const UserError& error) {
    const std::string said = error.what();
    for (const std::string& word : words) EXPECT_NE(said.find(word), std::string::npos) << said << "\nlacks " << word;
  }
}

TEST(CheckDivides, NamesAxisKeyAndNumbers) {
  ParallelSection p;
  EXPECT_NO_THROW(check_divides(small(), Grid(p, 1)));
  p.tensor = 3;
  expect_complaint(small(), p, 3, {"tensor = 3 does not divide num_attention_heads = 8: 2 or 4 would"});
  Architecture a = small();
  a.heads = 9, a.kv_heads = 2;
  expect_complaint(a, p, 3, {"tensor = 3 and num_key_value_heads = 2: one must divide the other, as 2 or 4 would"});
  a = small(), a.vocab = 2, p.tensor = 4;
  expect_complaint(a, p, 4, {"tensor = 4 ranks for vocab_size = 2", "2 is the most"});
  a = small(), a.heads = 9, p.tensor = 3;
  a.kv_heads = 3, a.ffn = 50;
  expect_complaint(a, p, 3, {"tensor = 3", "intermediate_size = 50"});
  p = {};
  p.expert = 5;
  expect_complaint(small(), p, 5, {"expert = 5", "num_experts = 12"});
  p = {};
  p.expert_tensor = 3;
  expect_complaint(small(), p, 3, {"expert_tensor = 3", "moe_intermediate_size = 8"});
  p = {};
  p.expert = 2;
  expect_complaint(k06B, p, 2, {"expert = 2", "dense"});
}

}  // namespace
}  // namespace upcycle
