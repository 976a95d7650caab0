// Training through pipeline stages is training on one rank: losses, norms, balance losses, counts of tokens per expert and, after five
// steps, every parameter. The run on one rank leaves its numbers in the build tree for the others (a CTest fixture).
#include "train/pipeline.hpp"

#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include "base/error.hpp"
#include "support/tiny_training.hpp"

namespace upcycle {
namespace {

constexpr int64_t kSteps = 5;

struct Model {
  const char* name;
  bool tied;
  int64_t layers;
  int64_t micro_batch;
  bool moe = true;
};
const Model kModels[] = {{"tied", true, 7, 1}, {"untied", false, 8, 2}, {"dense", true, 4, 1, false}};

Architecture tiny(const Model& m) {
  Architecture a;
  a.hidden = 32, a.layers = m.layers, a.heads = 4, a.kv_heads = 2, a.head_dim = 16, a.ffn = 48, a.vocab = 96, a.tied = m.tied;
  if (m.moe) a.experts = 8, a.top_k = 2, a.expert_ffn = 24, a.dense_layers = {1, 4};
  return a;
}

RunConfig run_of(const Model& m, const ParallelSection& parallel) {
  RunConfig run;
  run.train.steps = kSteps, run.train.sequence = 16, run.train.global_batch = 12, run.train.micro_batch = m.micro_batch;
  run.train.precision = Precision::fp32;
  run.optimizer.lr = 1e-3, run.optimizer.schedule = Schedule::constant, run.optimizer.clip = 1.0;
  run.balance.aux = 0.05, run.balance.z = 0.01;
  run.parallel = parallel, run.parallel.zero = 0;
  return run;
}

std::string reference_of(const Model& m) { return std::string(UPCYCLE_REFERENCE_DIR) + "/" + m.name; }

/// Five steps and a validation; `judge` sees the weights afterwards.
template <class Judge>
std::vector<StepReport> train(const Model& m, const ParallelSection& parallel, Judge&& judge) {
  TinyModel model;
  model.architecture = tiny(m), model.seed = 1, model.weights = decided_weights(3);
  TinyTraining training(model, run_of(m, parallel));
  std::vector<StepReport> steps;
  for (int64_t step = 0; step < kSteps; ++step) steps.push_back(training.step());
  steps.emplace_back().loss = training.trainer().validate(training.sampler(), 1);
  judge(training.stage().weights());
  return steps;
}

void store(const Model& m) {
  std::filesystem::create_directories(UPCYCLE_REFERENCE_DIR);
  std::ofstream parameters(reference_of(m) + ".parameters", std::ios::binary);
  const auto keep = [&](Weights& weights) {
    for (const ParameterSpec& spec : catalogue(weights.architecture())) {
      for (const Weight& weight : weights.all()) {
        for (const Part& part : weight.parts) {
          if (part.spec.name != spec.name) continue;
          const Tensor whole = part.of(weight.parameter.master).contiguous();
          parameters.write(static_cast<const char*>(whole.data_ptr()), static_cast<std::streamsize>(whole.nbytes()));
        }
      }
    }
  };
  std::ofstream out(reference_of(m) + ".txt");
  out.precision(17);
  const std::vector<StepReport> steps = train(m, {}, keep);
  EXPECT_LT(steps[kSteps - 1].loss, steps[0].loss - 0.02) << "weights that do not move prove nothing";
  for (const StepReport& step : steps) {
    out << step.loss << ' ' << step.gradient_norm << ' ' << step.aux_loss << ' ' << step.z_loss << ' ' << step.tokens_per_expert.size();
    for (const auto& layer : step.tokens_per_expert) {
      for (const int64_t count : layer) out << ' ' << count;
    }
    out << '\n';
  }
}

std::vector<StepReport> load(const Model& m) {
  std::ifstream in(reference_of(m) + ".txt");
  std::vector<StepReport> steps;
  size_t layers = 0;
  for (StepReport step; in >> step.loss >> step.gradient_norm >> step.aux_loss >> step.z_loss >> layers; steps.push_back(step)) {
    step.tokens_per_expert.assign(layers, std::vector<int64_t>(8));
    for (auto& layer : step.tokens_per_expert) {
      for (int64_t& count : layer) in >> count;
    }
  }
  return steps;
}

/// This rank's parameters against the boxes of the whole ones: the distance, relative to the whole tensor's norm.
void expect_parameters(const Model& m, Weights& weights) {
  std::ifstream in(reference_of(m) + ".parameters", std::ios::binary);
  for (const ParameterSpec& spec : catalogue(weights.architecture())) {
    Tensor whole = at::zeros(spec.shape, at::kFloat);
    in.read(static_cast<char*>(whole.data_ptr()), static_cast<std::streamsize>(whole.nbytes()));
    const double norm = whole.norm().item<double>();
    for (const Weight& weight : weights.all()) {
      for (const Part& part : weight.parts) {
        if (part.spec.name != spec.name) continue;
        Tensor expected = whole;
        for (size_t d = 0; d < part.box.begin.size(); ++d) {
          expected = expected.narrow(static_cast<int64_t>(d), part.box.begin[d], part.box.size[d]);
        }
        EXPECT_LT((part.of(weight.parameter.master) - expected).norm().item<double>(), 1e-5 * norm) << spec.name;
      }
    }
  }
  EXPECT_TRUE(in.good()) << "the reference is too short";
}

void expect_as_on_one_rank(const Model& m, const ParallelSection& p) {
  SCOPED_TRACE(text(m.name, ": pipeline ", p.pipeline, " x ", p.virtual_stages, ", expert ", p.expert, ", layout of ", p.layout.size()));
  const std::vector<StepReport> one = load(m);
  ASSERT_EQ(one.size(), kSteps + 1U) << "ranks.pipeline.1 has not run";
  const std::vector<StepReport> ours = train(m, p, [&](Weights& weights) { expect_parameters(m, weights); });
  for (size_t step = 0; step <= kSteps; ++step) {
    SCOPED_TRACE(text("step ", step + 1));
    EXPECT_NEAR(ours[step].loss, one[step].loss, 1e-6 * one[step].loss);
    EXPECT_NEAR(ours[step].gradient_norm, one[step].gradient_norm, 1e-6 * one[step].gradient_norm);
    EXPECT_NEAR(ours[step].aux_loss, one[step].aux_loss, 1e-6 * one[step].aux_loss);
    EXPECT_NEAR(ours[step].z_loss, one[step].z_loss, 1e-6 * one[step].z_loss);
    EXPECT_EQ(ours[step].tokens_per_expert, one[step].tokens_per_expert) << "of all layers, on every rank";
  }
}

class Training : public testing::TestWithParam<Model> {};

TEST_P(Training, ThroughStagesIsTrainingOnOneRank) {
  const Model& m = GetParam();
  if (world_size() == 1) return store(m);
  std::vector<ParallelSection> layouts;
  if (world_size() == 2) {
    layouts = {{.pipeline = 2}, {.pipeline = 2, .virtual_stages = 2}, {.pipeline = 2, .count_embedding = true, .count_loss = true},
               {.pipeline = 2, .layout = {1, m.layers - 1}}, {.pipeline = 2, .virtual_stages = 2, .layout = {1, m.layers - 3, 1, 1}}};
  } else {
    layouts = {{.pipeline = 4}, {.pipeline = 2}, {.pipeline = 2, .virtual_stages = 2}};
    if (m.layers == 8) layouts.push_back({.pipeline = 4, .virtual_stages = 2});
    if (m.layers > 4) layouts.push_back({.pipeline = 2, .virtual_stages = 3});
    if (m.moe) layouts.push_back({.pipeline = 2, .virtual_stages = 2, .expert = 2});
  }
  for (const ParallelSection& parallel : layouts) expect_as_on_one_rank(m, parallel);
}

INSTANTIATE_TEST_SUITE_P(Models, Training, testing::ValuesIn(kModels), [](const auto& info) { return std::string(info.param.name); });

// Chunk c doubles and adds c, exactly, in this order only; so the sum of losses and the gradient at chunk 0 are known.
TEST(Pipeline, GradientsComeBackAndActivationsAreFreed) {
  const Communicator world = Communicator::everyone();
  const int stages = world.size();
  for (const int virtual_stages : {1, 2, 3}) {
    if (stages == 1 && virtual_stages > 1) continue;
    for (const int64_t micro_batches : {1, 3, 4, 9}) {
      SCOPED_TRACE(text(stages, " stages x ", virtual_stages, ", ", micro_batches, " micro-batches"));
      ParallelSection parallel;
      parallel.pipeline = stages, parallel.virtual_stages = virtual_stages;
      Layout layout{.grid = Grid(parallel, stages), .virtual_stages = virtual_stages};
      const int chunks = layout.chunks();
      constexpr int64_t kNumbers = 3000;   // more than MPI sends without a receiver
      Pipeline pipeline(world, layout, [] { return at::zeros({kNumbers}); });

      int alive = 0, most_alive = 0;
      double gradient = 0.0, factor = 1.0, sum = 0.0;
      for (int chunk = 0; chunk < chunks; ++chunk) factor *= 2;
      for (int64_t j = 0; j < micro_batches; ++j) {
        double x = static_cast<double>(j + 1);
        for (int chunk = 0; chunk < chunks; ++chunk) x = 2 * x + chunk;
        sum += x;
      }
      // An output that counts itself; a hand-written op, so that nothing but the pipeline can keep it.
      const auto forward = [&](int64_t j, int chunk, const Tensor& x) {
        Tensor output;
        {
          const Unrecorded guard;
          const Tensor input = chunk == 0 ? at::full({kNumbers}, static_cast<float>(j + 1)) : x;
          const Tensor y = input * 2 + chunk;
          most_alive = std::max(most_alive, ++alive);
          output = at::from_blob(y.data_ptr(), {kNumbers}, [&alive, y](void*) { --alive; });
        }
        const Tensor y = record(output, {x.defined() ? x : Tensor()}, [&gradient, chunk](const std::vector<Tensor>& dy) -> Gradients {
          const Tensor dx = dy[0] * 2;
          if (chunk == 0) gradient += dx.sum().item<double>();
          return {dx};
        });
        return chunk == chunks - 1 ? y.narrow(0, 0, 1).sum() : y;
      };
      const bool last = world.rank() == stages - 1;
      EXPECT_DOUBLE_EQ(pipeline.train(micro_batches, forward).item<double>(), last ? sum : 0.0);
      EXPECT_DOUBLE_EQ(gradient, world.rank() == 0 ? factor * static_cast<double>(micro_batches) : 0.0);
      EXPECT_EQ(alive, 0);
      EXPECT_LE(most_alive, 2) << "an output is there until it is sent";
      const int behind = stages - 1 - world.rank();
      const int64_t fill = virtual_stages == 1 ? behind : 2 * behind + (virtual_stages - 1) * stages;
      EXPECT_LE(static_cast<int64_t>(pipeline.most_in_flight()), std::min<int64_t>(fill + 1, micro_batches * virtual_stages));

      EXPECT_DOUBLE_EQ(pipeline.evaluate(micro_batches, forward).item<double>(), last ? sum : 0.0);
      EXPECT_EQ(alive, 0);
    }
  }
}

}  // namespace
}  // namespace upcycle
