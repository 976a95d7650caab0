// Documents on any layout: concatenated, packed, and learned in part by a loss mask. With each sequence's positions spread over context
// ranks, with stages and with halves of every layer, losses, norms and gradients are those of one rank; and packed documents train as if
// each were alone.
// The run on one rank leaves its numbers in the build tree for the others (a CTest fixture).
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <map>

#include "base/error.hpp"
#include "base/rng.hpp"
#include "support/decided_weights.hpp"
#include "support/numbers.hpp"
#include "support/tiny_training.hpp"
#include "train/start.hpp"
#include "train/trainer.hpp"
#include "unit/data/indexed_files.hpp"

namespace upcycle {
namespace {

constexpr int64_t kSteps = 5, kVocab = 96;

struct Case {
  const char* name;
  Borders borders;
  bool masked;   ///< every other document is only read, and the first third of the others
};
const Case kCases[] = {
    {"concatenated", Borders::concatenated, false}, {"packed", Borders::packed, false}, {"learned_in_part", Borders::packed, true}};

Architecture tiny(bool tied, bool moe = true) {
  Architecture a;
  a.hidden = 32, a.layers = 4, a.heads = 4, a.kv_heads = 2, a.head_dim = 16, a.ffn = 48, a.vocab = kVocab, a.tied = tied;
  if (moe) a.experts = 8, a.top_k = 2, a.expert_ffn = 24, a.dense_layers = {1};
  return a;
}

Documents documents() {
  Documents text = numbered(60);   // of 0 to 40 tokens
  for (auto& document : text) {
    for (int64_t& token : document) token = (token * 7919 + token * token) % kVocab;
  }
  return text;
}

Documents mask() {
  Documents mask = documents();
  for (size_t d = 0; d < mask.size(); ++d) {
    for (size_t t = 0; t < mask[d].size(); ++t) mask[d][t] = d % 2 == 1 && t >= mask[d].size() / 3;
  }
  return mask;
}

struct Outcome {
  std::vector<double> losses, norms;
  std::map<std::string, Tensor> gradients;   ///< of the first step, this rank's boxes; on one rank the whole
  std::map<std::string, Box> boxes;
};

Outcome train(const Case& c, const ParallelSection& parallel) {
  RunConfig run;
  run.train.steps = kSteps, run.train.sequence = 32, run.train.global_batch = 4, run.train.micro_batch = 1;
  run.train.precision = Precision::fp32;
  run.optimizer.lr = 1e-3, run.optimizer.schedule = Schedule::constant, run.optimizer.clip = 0.0;
  run.optimizer.eps = 1e-6;   // a gradient that is zero but for rounding moves nothing
  run.balance.aux = 0.05, run.balance.z = 0.01;
  run.data.documents = c.borders;
  run.parallel = parallel, run.parallel.zero = 0;   // everyone has whole gradients
  const Scratch scratch;
  if (c.masked) write_mask(scratch, mask());
  run.data.train = {{1.0, write_documents(scratch, documents())}};
  TinyModel model;
  model.architecture = tiny(true), model.seed = 5, model.weights = decided_weights(3);
  TinyTraining training(model, run);
  const Sampler& sampler = training.sampler();
  Outcome numbers;
  int64_t fewest = run.train.sequence;   // learned labels of a micro-batch
  for (int64_t step = 0; step < kSteps; ++step) {
    const StepReport report = training.step();
    for (int64_t i = 4 * step; i < 4 * step + 4; ++i) fewest = std::min(fewest, sampler.learned(i, 1));
    EXPECT_EQ(report.learned.value_or(4 * run.train.sequence), sampler.learned(4 * step, 4));
    EXPECT_EQ(report.learned.has_value(), c.masked);
    numbers.losses.push_back(report.loss);
    numbers.norms.push_back(report.gradient_norm);
    if (step > 0) continue;
    for (const Weight& weight : training.stage().weights().all()) {
      for (const Part& part : weight.parts) {
        numbers.gradients[part.spec.name] = part.of(weight.parameter.main_grad).clone();
        numbers.boxes[part.spec.name] = part.box;
      }
    }
  }
  EXPECT_EQ(fewest, c.masked ? 0 : run.train.sequence) << "some micro-batches teach nothing, others do";
  // The same on all ranks, so it takes its place beside the losses.
  numbers.losses.push_back(training.trainer().validate(sampler, 2));
  return numbers;
}

std::filesystem::path reference_of(const Case& c) { return std::filesystem::path(UPCYCLE_REFERENCE_DIR) / c.name; }

void store_reference(const Outcome& numbers, const Case& c) {
  std::string curve(reinterpret_cast<const char*>(numbers.losses.data()), numbers.losses.size() * sizeof(double));
  curve.append(reinterpret_cast<const char*>(numbers.norms.data()), numbers.norms.size() * sizeof(double));
  store(reference_of(c) / "curve", curve);
  for (const auto& [name, gradient] : numbers.gradients) {
    const Tensor dense = gradient.contiguous();
    store(reference_of(c) / name, std::string(static_cast<const char*>(dense.const_data_ptr()), dense.nbytes()));
  }
}

void expect_reference(const Outcome& numbers, const Case& c, const Architecture& architecture) {
  const std::string curve = contents(reference_of(c) / "curve");
  ASSERT_EQ(curve.size(), (2 * kSteps + 1) * sizeof(double)) << "run this test on one rank first";
  std::vector<double> expected(2 * kSteps + 1);
  std::memcpy(expected.data(), curve.data(), curve.size());
  for (size_t i = 0; i < numbers.losses.size(); ++i) EXPECT_NEAR(numbers.losses[i], expected[i], 1e-6 * expected[i]) << "loss " << i;
  for (size_t i = 0; i < numbers.norms.size(); ++i) {
    const double norm = expected[numbers.losses.size() + i];
    EXPECT_NEAR(numbers.norms[i], norm, 1e-6 * norm) << "gradient norm of step " << i;
  }
  for (const ParameterSpec& spec : catalogue(architecture)) {
    if (!numbers.gradients.contains(spec.name)) continue;   // of another rank
    const std::string bytes = contents(reference_of(c) / spec.name);
    Tensor whole = at::empty(spec.shape, at::kFloat);
    ASSERT_EQ(bytes.size(), whole.nbytes());
    std::memcpy(whole.mutable_data_ptr(), bytes.data(), bytes.size());
    const Box& box = numbers.boxes.at(spec.name);
    for (size_t d = 0; d < box.begin.size(); ++d) whole = whole.narrow(static_cast<int64_t>(d), box.begin[d], box.size[d]);
    EXPECT_LE(distance(numbers.gradients.at(spec.name), whole), 1e-5) << spec.name;
  }
}

class Context : public testing::TestWithParam<Case> {};

TEST_P(Context, LossesNormsAndGradientsAreThoseOfOneRank) {
  const Case& c = GetParam();
  const int ranks = world_size();
  if (ranks == 1) store_reference(train(c, {}), c);
  std::vector<ParallelSection> layouts = {{.context = ranks}, {.context = ranks, .expert = ranks}};
  if (ranks == 2) {
    layouts.insert(layouts.end(), {{.pipeline = 2}, {.pipeline = 2, .virtual_stages = 2}, {.tensor = 2}, {}});
  } else if (ranks == 4) {
    layouts.insert(layouts.end(), {{.context = 2},   // beside data
                                   {.tensor = 2, .context = 2}, {.tensor = 2, .pipeline = 2},
                                   {.context = 2, .pipeline = 2, .virtual_stages = 2}});
  }
  for (const ParallelSection& p : layouts) {
    SCOPED_TRACE(text("tensor ", p.tensor, ", context ", p.context, ", pipeline ", p.pipeline, " x ", p.virtual_stages, ", expert ", p.expert));
    expect_reference(train(c, p), c, tiny(true));
  }
}

INSTANTIATE_TEST_SUITE_P(Documents, Context, testing::ValuesIn(kCases), [](const auto& info) { return std::string(info.param.name); });

TEST(PackingAndMasks, MatterToTheLoss) {
  if (world_size() > 1) GTEST_SKIP() << "on one rank";
  const double a = train(kCases[0], {}).losses[0], b = train(kCases[1], {}).losses[0], learned = train(kCases[2], {}).losses[0];
  EXPECT_GT(std::abs(a - b), 1e-4 * a);
  EXPECT_GT(std::abs(b - learned), 1e-4 * b) << "nor is the mean over some tokens the mean over all";
}

class Packing : public testing::TestWithParam<bool> {};

TEST_P(Packing, GradientsAreTheSumOfThoseOfTheDocumentsAlone) {
  if (world_size() > 1) GTEST_SKIP() << "documents of odd lengths are for one rank";
  const Mesh mesh(Grid({}, 1));
  const Architecture architecture = tiny(false, /*moe=*/GetParam());
  Stage stage(architecture, Layout::even(mesh.grid(), architecture), mesh);
  stage.weights().allocate(at::kFloat, at::kCPU);
  fill_masters(stage.weights(), decided_weights(3));
  const Tensor tokens = at::randint(kVocab, {2, 47}, at::detail::createCPUGenerator(1), at::kLong);
  const Tensor labels = at::randint(kVocab, {2, 47}, at::detail::createCPUGenerator(2), at::kLong);
  const std::vector<std::vector<int64_t>> borders = {{0, 1, 2, 19, 47}, {0, 33, 46, 47}};
  Tensor starts = at::zeros({2, 47}, at::kLong);
  for (int64_t b = 0; b < 2; ++b) {
    for (const int64_t border : borders[b]) starts.select(0, b).narrow(0, border, 47 - border).fill_(border);
  }
  // Adds into the gradients; the sum of the losses.
  const auto pass = [&](const Tensor& tokens, const Tensor& labels, const Tensor& starts) {
    const Positions positions = stage.positions(tokens.size(0), tokens.size(1), starts);
    const Tensor every = at::ones(labels.sizes(), at::TensorOptions(at::kFloat));
    const Tensor loss = stage.loss(stage.blocks(stage.embed(tokens), positions, {}), labels, every);
    GraphEnd(loss).backward(at::ones_like(loss));
    return loss.item<double>();
  };
  const auto take_gradients = [&] {
    std::map<std::string, Tensor> gradients;
    for (Weight& weight : stage.weights().all()) {
      gradients[weight.spec().name] = weight.parameter.main_grad.clone();
      weight.parameter.main_grad.zero_();
    }
    return gradients;
  };
  const double packed_loss = pass(tokens, labels, starts);
  const auto packed = take_gradients();
  double loss = 0.0;
  for (int64_t b = 0; b < 2; ++b) {
    for (size_t d = 0; d + 1 < borders[b].size(); ++d) {
      const int64_t begin = borders[b][d], size = borders[b][d + 1] - begin;
      const auto alone = [&](const Tensor& x) { return x.narrow(0, b, 1).narrow(1, begin, size).contiguous(); };
      loss += pass(alone(tokens), alone(labels), {});
    }
  }
  EXPECT_NEAR(packed_loss, loss, 1e-5 * loss);
  for (const auto& [name, gradient] : take_gradients()) EXPECT_LE(distance(packed.at(name), gradient), 1e-5) << name;
}

INSTANTIATE_TEST_SUITE_P(Models, Packing, testing::Bool(), [](const auto& info) { return std::string(info.param ? "mixture" : "dense"); });

}  // namespace
}  // namespace upcycle
