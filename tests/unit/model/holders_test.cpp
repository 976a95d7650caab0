#include "model/holders.hpp"

#include <gtest/gtest.h>

#include <chrono>
#include <map>
#include <numeric>
#include <set>

#include "base/error.hpp"

namespace upcycle {
namespace {

Architecture small(bool tied = true) {
  Architecture a;
  a.hidden = 24, a.layers = 4, a.heads = 8, a.kv_heads = 2, a.head_dim = 6, a.ffn = 48, a.vocab = 101, a.tied = tied;
  a.experts = 8, a.top_k = 2, a.expert_ffn = 16, a.dense_layers = {0};
  return a;
}

ParallelSection degrees(int64_t tensor, int64_t context, int64_t pipeline, int64_t expert, int64_t expert_tensor = 1) {
  ParallelSection p;
  p.tensor = tensor, p.context = context, p.pipeline = pipeline, p.expert = expert, p.expert_tensor = expert_tensor;
  return p;
}

struct World {
  Architecture architecture;
  Layout layout;
  World(const ParallelSection& p, int ranks, bool tied = true) : architecture(small(tied)), layout(Layout::even(Grid(p, ranks), architecture)) {}
  std::vector<int> of(const std::string& name, int rank) const { return holders(find(catalogue(architecture), name), layout, rank); }
};

std::vector<int> ranks(int begin, int end, int step = 1) {
  std::vector<int> out;
  for (int rank = begin; rank < end; rank += step) out.push_back(rank);
  return out;
}

const std::string kFirst = "model.layers.0.", kSecond = "model.layers.1.", kLast = "model.layers.3.";

TEST(Holders, DenseSlicesOverContextAndData) {
  const World world(degrees(2, 2, 1, 1), 8);
  for (const char* name : {"self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"}) {
    EXPECT_EQ(world.of(kFirst + name + ".weight", 2), ranks(0, 8, 2)) << name;
    EXPECT_EQ(world.of(kFirst + name + ".weight", 5), ranks(1, 8, 2)) << name;
  }
  EXPECT_EQ(world.of("model.embed_tokens.weight", 5), ranks(1, 8, 2));
}

TEST(Holders, NormsAndRoutersOverTheWholeStage) {
  const World world(degrees(2, 2, 2, 4), 16, false);
  for (const char* name : {"input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm", "mlp.gate"}) {
    EXPECT_EQ(world.of(kSecond + name + ".weight", 3), ranks(0, 8)) << name;
    EXPECT_EQ(world.of(kSecond + name + ".weight", 8), ranks(0, 0)) << name << ": the second stage has other layers";
    EXPECT_EQ(world.of(kLast + name + ".weight", 9), ranks(8, 16)) << name;
  }
  EXPECT_EQ(world.of("model.norm.weight", 12), ranks(8, 16));
  EXPECT_EQ(world.of("lm_head.weight", 12), ranks(8, 16, 2));
}

TEST(Holders, KeyValueHeadsAlsoOverTheTensorRanksThatShareOne) {
  const World world(degrees(4, 1, 1, 1), 8);   // 2 key/value heads over 4 tensor ranks
  EXPECT_EQ(world.of(kFirst + "self_attn.k_proj.weight", 1), (std::vector<int>{0, 1, 4, 5}));
  EXPECT_EQ(world.of(kFirst + "self_attn.v_proj.weight", 6), (std::vector<int>{2, 3, 6, 7}));
  EXPECT_EQ(world.of(kFirst + "self_attn.q_proj.weight", 6), (std::vector<int>{2, 6}));
}

TEST(Holders, ExpertsOverExpertData) {
  const World whole(degrees(2, 1, 1, 4), 8);
  EXPECT_EQ(whole.of(kSecond + "mlp.experts.up_proj.weight", 6), (std::vector<int>{2, 6}));
  const World cut(degrees(2, 1, 1, 2, 2), 8);   // each expert's width over two ranks
  EXPECT_EQ(cut.of(kSecond + "mlp.experts.up_proj.weight", 5), (std::vector<int>{1, 5}));
  EXPECT_EQ(cut.of(kSecond + "mlp.experts.down_proj.weight", 6), (std::vector<int>{2, 6}));
}

TEST(Holders, ATiedEmbeddingOverTheFirstAndTheLastStage) {
  const World world(degrees(2, 1, 4, 1), 16);
  EXPECT_EQ(world.of("model.embed_tokens.weight", 1), (std::vector<int>{1, 3, 13, 15}));
  EXPECT_EQ(world.of("model.embed_tokens.weight", 12), (std::vector<int>{0, 2, 12, 14}));
  EXPECT_EQ(world.of("model.embed_tokens.weight", 5), std::vector<int>{});
  const World untied(degrees(2, 1, 4, 1), 16, false);
  EXPECT_EQ(untied.of("model.embed_tokens.weight", 1), (std::vector<int>{1, 3}));
}

/// On every layout: holders are exactly those with an equal box, as asking every rank for its box says; and the partitions say the same.
TEST(Holders, AreWhoHasTheSameBoxOnEveryLayout) {
  int layouts = 0;
  for (const bool tied : {false, true}) {
    for (const int64_t tp : {1, 2, 4, 8}) {
      for (const int64_t cp : {1, 2}) {
        for (const int64_t pp : {1, 2, 4}) {
          for (const int64_t ep : {1, 2, 4, 8}) {
            for (const int64_t etp : {1, 2}) {
              const int64_t stage = tp * cp * 2;
              if (stage % (ep * etp) != 0) continue;
              ++layouts;
              const World world(degrees(tp, cp, pp, ep, etp), static_cast<int>(stage * pp), tied);
              SCOPED_TRACE(text("tp ", tp, " cp ", cp, " pp ", pp, " ep ", ep, " etp ", etp, " tied ", tied));
              const Grid& grid = world.layout.grid;
              const HolderGroups groups(world.architecture, world.layout);
              for (const ParameterSpec& spec : catalogue(world.architecture)) {
                if (spec.layer > 0 && spec.layer < 3) continue;
                std::map<std::pair<Shape, Shape>, std::vector<int>> by_box;
                for (int rank = 0; rank < grid.world(); ++rank) {
                  if (const auto box = local_box(spec, world.layout, grid.at(rank))) by_box[{box->begin, box->size}].push_back(rank);
                }
                const Partition& partition = groups.partitions()[groups.of(spec)];
                for (const auto& [box, expected] : by_box) {
                  ASSERT_EQ(num_holders(spec, world.layout), static_cast<int>(expected.size())) << spec.name;
                  ASSERT_EQ(holders(spec, world.layout, expected.back()), expected) << spec.name;
                  for (const int rank : expected) ASSERT_EQ(partition[static_cast<size_t>(rank)], expected.front()) << spec.name;
                }
              }
            }
          }
        }
      }
    }
  }
  EXPECT_GT(layouts, 150);
}

// The groups that a rank is in with others are of the ranks' own kind of stage: nobody waits for a rank that does not come.
TEST(Holders, PartitionsAreFewAndOfRanksThatAgree) {
  const World world(degrees(4, 1, 4, 2), 32);
  const HolderGroups groups(world.architecture, world.layout);
  EXPECT_EQ(groups.partitions().size(), 5U);   // embedding, norms and routers, q, k and v, experts
  for (const Partition& leaders : groups.partitions()) {
    for (int rank = 0; rank < 32; ++rank) {
      const int leader = leaders[static_cast<size_t>(rank)];
      EXPECT_LE(leader, rank);
      EXPECT_EQ(leaders[static_cast<size_t>(leader)], leader);
    }
  }
  const World plain(degrees(1, 1, 1, 1), 8);
  EXPECT_EQ(HolderGroups(plain.architecture, plain.layout).partitions(), std::vector<Partition>{Partition(8, 0)});
}

TEST(Holders, TakeMillisecondsAtSixteenThousandRanks) {
  Architecture a = small();
  a.layers = 64, a.heads = 64, a.kv_heads = 8, a.hidden = 8192, a.ffn = 16384, a.vocab = 151936, a.experts = 128;
  const Layout layout = Layout::even(Grid(degrees(8, 2, 16, 64), 16384), a);
  const auto start = std::chrono::steady_clock::now();
  const HolderGroups groups(a, layout);
  size_t total = 0;
  for (const ParameterSpec& spec : catalogue(a)) {
    total += groups.of(spec);
    EXPECT_GT(num_holders(spec, layout), 1);
  }
  EXPECT_EQ(holders(find(catalogue(a), kLast + "mlp.experts.up_proj.weight"), layout, 777).size(), 16U);
  EXPECT_EQ(groups.partitions().size(), 4U);
  EXPECT_GT(total, 0U);
  EXPECT_LT(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count(), 0.5);
}

}  // namespace
}  // namespace upcycle
