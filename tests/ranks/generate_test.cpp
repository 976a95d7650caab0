#include "train/generate.hpp"

#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>

#include "golden/model.hpp"
#include "support/decided_weights.hpp"
#include "support/tensors.hpp"

namespace upcycle {
namespace {

Architecture small(bool moe) {
  Architecture a;
  a.hidden = 32, a.layers = 4, a.heads = 4, a.kv_heads = 2, a.head_dim = 16, a.ffn = 48, a.vocab = 96, a.tied = false, a.max_positions = 64;
  if (moe) a.experts = 8, a.top_k = 3, a.expert_ffn = 24, a.dense_layers = {1};
  return a;
}

struct Said {
  std::vector<int64_t> tokens;
  std::vector<std::vector<ChosenExperts>> routing;
  Ending ending;
};

/// All ranks of the world, spread as `sample` spreads them.
class Spread {
 public:
  explicit Spread(const Architecture& a, const nlohmann::json& routers = {})
      : mesh_(Grid(generation_layout(a, world_size()), world_size())), generator_(a, decided_weights(11), routers, mesh_, at::kCPU, at::kFloat) {}
  Said say(const GenerationRequest& request, int64_t sample = 0) {
    Said said;
    said.ending = generator_.generate(request, sample, [&](const GeneratedToken& token) {
      said.tokens.push_back(token.id);
      said.routing.push_back(token.routing);
    });
    return said;
  }
  Generator& generator() { return generator_; }
  const Mesh& mesh() const { return mesh_; }

 private:
  Mesh mesh_;
  Generator generator_;
};

/// One rank that computes everything again for each token, without a cache, by the path that training takes.
Said say_alone(Model& model, const GenerationRequest& request, int64_t sample = 0) {
  std::vector<int64_t> text = request.prompt;
  Said said;
  const Random random(request.seed, "sample/" + std::to_string(sample));
  for (int64_t i = 0; i < request.tokens; ++i) {
    const Tensor logits = model.logits(at::tensor(text, at::kLong).unsqueeze(0));
    said.tokens.push_back(choose_token(logits[logits.size(0) - 1], request.choice, random.uniform(static_cast<uint64_t>(i))));
    text.push_back(said.tokens.back());
  }
  return said;
}

GenerationRequest request(double temperature) {
  return {.prompt = {5, 17, 40, 3, 3, 80, 22}, .tokens = 30, .choice = {temperature, 0.9}, .seed = 3, .ends = {}, .routing = true};
}

TEST(Generate, ARequestIsAText) {
  for (const bool moe : {false, true}) {
    const Architecture a = small(moe);
    Spread spread(a);
    for (const double temperature : {0.0, 1.0}) {
      const Said said = spread.say(request(temperature));
      const Said other = spread.say(request(temperature), 1), again = spread.say(request(temperature));
      if (world_rank() != 0) continue;
      EXPECT_EQ(said.tokens, again.tokens) << "the same text once more, after another one";
      EXPECT_EQ(said.tokens.size(), 30U);
      EXPECT_EQ(said.ending, Ending::tokens);
      EXPECT_EQ(said.tokens == other.tokens, temperature == 0);
    }
  }
}

// Model's mesh is one of all ranks, so the reference is one for a world of one.
TEST(Generate, AgreesWithTheTrainingPath) {
  if (world_size() != 1) GTEST_SKIP() << "of one rank";
  for (const bool moe : {false, true}) {
    const Architecture a = small(moe);
    Model model(a, decided_weights(11));
    Spread spread(a);
    for (const double temperature : {0.0, 1.0}) {
      for (const int64_t sample : {0, 1}) EXPECT_EQ(spread.say(request(temperature), sample).tokens, say_alone(model, request(temperature), sample).tokens);
    }
  }
}

// The reference of several ranks: the tokens that one rank says, written down. A change of the model's numbers changes them, and then
// AgreesWithTheTrainingPath must still hold.
TEST(Generate, AnyNumberOfRanksSaysTheSame) {
  const std::string path = std::string(UPCYCLE_REFERENCE_DIR) + "/generated.json";
  nlohmann::json all = nlohmann::json::array();
  for (const bool moe : {false, true}) {
    Spread spread(small(moe), moe ? nlohmann::json{{"2", {{"bias", {0.5, 0, 0, 0.25, 0, 0, -0.5, 0}}}}} : nlohmann::json());
    for (const double temperature : {0.0, 1.0}) {
      const Said said = spread.say(request(temperature));
      nlohmann::json routing = nlohmann::json::array();
      for (const auto& token : said.routing) {
        for (const ChosenExperts& layer : token) routing.push_back({layer.layer, layer.experts, layer.weights});
      }
      all.push_back({said.tokens, routing});
    }
  }
  if (world_rank() != 0) return;
  if (world_size() == 1) {
    std::filesystem::create_directories(UPCYCLE_REFERENCE_DIR);
    std::ofstream(path) << all;
    return;
  }
  const nlohmann::json one = nlohmann::json::parse(std::ifstream(path));
  ASSERT_EQ(one.size(), 4U);
  for (size_t i = 0; i < one.size(); ++i) {
    EXPECT_EQ(all[i][0], one[i][0]);
    ASSERT_EQ(all[i][1].size(), one[i][1].size());
    EXPECT_EQ(all[i][1].size(), i < 2 ? 0U : 30U * 3U) << "30 tokens, 3 layers with experts";
    for (size_t k = 0; k < one[i][1].size(); ++k) {
      EXPECT_EQ(all[i][1][k][1], one[i][1][k][1]);
      for (size_t e = 0; e < one[i][1][k][2].size(); ++e) EXPECT_NEAR(all[i][1][k][2][e].get<double>(), one[i][1][k][2][e].get<double>(), 1e-6);
    }
  }
}

TEST(Generate, KeptKeysAndValuesChangeNoLogit) {
  const std::vector<int64_t> text = {5, 17, 40, 3, 3, 80, 22, 9, 9, 60, 1, 2, 3, 95, 0, 44, 21};
  for (const bool moe : {false, true}) {
    Spread spread(small(moe));
    Generator& generator = spread.generator();
    const auto last_of = [&](const std::vector<int64_t>& cuts) -> Tensor {   // the text in parts that end there
      Tensor logits;
      if (!generator.works()) return logits;
      generator.begin(static_cast<int64_t>(text.size()));
      int64_t from = 0;
      for (const int64_t to : cuts) {
        logits = generator.read({text.begin() + from, text.begin() + to});
        from = to;
      }
      return logits;
    };
    const Tensor whole = last_of({17});
    std::vector<int64_t> one_by_one;
    for (int64_t i = 1; i <= 17; ++i) one_by_one.push_back(i);
    for (const std::vector<int64_t>& cuts : {std::vector<int64_t>{9, 17}, {1, 4, 16, 17}, one_by_one}) {
      const Tensor parts = last_of(cuts);
      if (world_rank() == 0) EXPECT_LT(distance(parts, whole), 1e-5) << cuts.size() << " parts";
    }
    const Tensor other = last_of({3, 16});   // one token less: another answer, so the test can fail
    if (world_rank() == 0) EXPECT_GT(distance(other, whole), 1e-2);
  }
}

TEST(Generate, EndsWhereItShould) {
  Spread spread(small(true));
  GenerationRequest wish = request(0.0);
  const Said free = spread.say(wish);
  if (world_rank() == 0) wish.ends = {free.tokens.at(10), 1000};
  const Said ended = spread.say(wish);
  wish.ends.clear();
  wish.tokens = 500;
  const Said full = spread.say(wish);
  if (world_rank() != 0) return;
  EXPECT_EQ(ended.ending, Ending::end_token);
  const auto first = std::find(free.tokens.begin(), free.tokens.end(), free.tokens[10]) - free.tokens.begin();
  EXPECT_EQ(ended.tokens, std::vector<int64_t>(free.tokens.begin(), free.tokens.begin() + first)) << "the end token is not told";
  EXPECT_EQ(full.ending, Ending::positions);
  EXPECT_EQ(full.tokens.size(), 64U - wish.prompt.size());
}

TEST(Generate, ExpertsGoOverAsManyRanksAsDivide) {
  Architecture a = small(true);
  EXPECT_EQ(generation_layout(a, 4).expert, 4);
  EXPECT_EQ(generation_layout(a, 6).expert, 2);
  EXPECT_EQ(generation_layout(a, 3).expert, 1);
  EXPECT_EQ(generation_layout(small(false), 4).expert, 1);
  a.experts = 6;
  EXPECT_EQ(generation_layout(a, 4).expert, 2);
  // With 6 experts, two of four ranks hold three each, and the others nothing; the text comes all the same.
  Spread spread(a);
  const Said said = spread.say(request(0.0));
  EXPECT_EQ(spread.generator().works(), world_rank() < std::gcd(6, world_size()));
  if (world_rank() == 0) EXPECT_EQ(said.tokens.size(), 30U);
}

}  // namespace
}  // namespace upcycle
