// Loss masks: the gradient is that of the loss written by hand over the learned tokens alone; a mask of ones changes no bit, on any
// layout; and a step in which nothing is learned is no accident.
#include <ATen/ops/log_softmax.h>
#include <ATen/ops/nonzero.h>
#include <ATen/ops/ones_like.h>
#include <gtest/gtest.h>

#include <cmath>

#include "support/tensors.hpp"
#include "support/tiny_training.hpp"
#include "unit/data/indexed_files.hpp"

// N tokens of a batch, V vocabulary
namespace upcycle {
namespace {

constexpr int64_t kWords = 90;   // below every tiny model's vocabulary

Documents words() {
  Documents text = numbered(60);   // of 0 to 40 tokens
  for (auto& document : text) {
    for (int64_t& token : document) token = (token * 7919 + token * token) % kWords;
  }
  return text;
}

// A token says itself whether it is learned, so that a label needs no file to tell.
bool third(int64_t token) { return token % 3 == 2; }

TinyModel model(const std::string& name) {
  for (TinyModel& m : tiny_models(4)) {
    if (m.name != name + "-4") continue;
    m.run.balance = {.aux = 0.0};
    m.run.optimizer.clip = 0.0, m.run.optimizer.weight_decay = 0.0;
    return m;
  }
  throw std::logic_error("no model " + name);
}

TinyModel dense() {
  TinyModel m = model("tied");
  m.architecture.experts = 0, m.run.moe_given = false, m.run.moe.experts = 0;
  return m;
}

std::vector<Tensor> gradients_of(TinyTraining& training) {
  std::vector<Tensor> out;
  for (Weight& weight : training.stage().weights().all()) out.push_back(weight.parameter.main_grad.clone());
  return out;
}

std::vector<Tensor> values_of(TinyTraining& training) {
  std::vector<Tensor> out;
  for (Weight& weight : training.stage().weights().all()) out.push_back(weight.parameter.arrived().clone());
  return out;
}

void expect_same_bits(TinyTraining& training, const std::vector<Tensor>& a, const std::vector<Tensor>& b) {
  for (size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(same_bits(a[i], b[i])) << training.stage().weights().all()[i].spec().name;
}

TEST(LossMask, TheGradientIsThatOfTheLossWrittenByHand) {
  if (world_size() > 1) GTEST_SKIP() << "on one rank";
  for (TinyModel m : {model("tied"), model("mixed"), dense()}) {
    for (const Borders borders : {Borders::concatenated, Borders::packed}) {
      SCOPED_TRACE(text(m.name, m.run.moe_given ? "" : ", dense", borders == Borders::packed ? ", packed" : ""));
      const Scratch scratch;
      m.run.data = {.train = {{1.0, write_documents(scratch, words())}}, .documents = borders};
      TinyTraining unmasked(m, m.run);
      write_mask(scratch, mask_of(words(), third));
      TinyTraining training(m, m.run), by_hand(m, m.run);

      const Batch batch = by_hand.sampler().batch(0, m.run.train.global_batch);
      Stage& stage = by_hand.stage();
      const Positions positions = stage.positions(batch.tokens_BS.size(0), batch.tokens_BS.size(1), batch.starts_BS);
      const Tensor logits_NV = stage.logits(stage.blocks(stage.embed(batch.tokens_BS), positions, {}));
      const Tensor label_N = batch.labels_BS.reshape({-1}), learned = at::nonzero(label_N.remainder(3).eq(2)).squeeze(1);
      ASSERT_GT(learned.numel(), 20);
      ASSERT_LT(learned.numel(), label_N.numel() / 2);
      const Tensor log_p = at::log_softmax(logits_NV.index_select(0, learned).to(at::kDouble), -1);
      const Tensor loss = -log_p.gather(1, label_N.index_select(0, learned).unsqueeze(1)).mean();
      GraphEnd(loss).backward(at::ones_like(loss));

      const StepReport report = training.step();
      unmasked.step();
      EXPECT_EQ(report.learned, learned.numel());
      EXPECT_NEAR(report.loss, loss.item<double>(), 1e-6 * report.loss);
      const std::vector<Tensor> ours = gradients_of(training), theirs = gradients_of(by_hand), of_all = gradients_of(unmasked);
      for (size_t i = 0; i < ours.size(); ++i) {
        const std::string& name = stage.weights().all()[i].spec().name;
        EXPECT_GT(theirs[i].norm().item<double>(), 0.0) << name;
        EXPECT_LE(distance(ours[i], theirs[i]), 1e-5) << name;
        EXPECT_GT(distance(of_all[i], theirs[i]), 0.05) << name << ": a mask that changes nothing proves nothing";
      }
    }
  }
}

TEST(LossMask, OfOnesChangesNoBit) {
  std::vector<ParallelSection> layouts = {{}};
  if (world_size() == 2) layouts = {{}, {.tensor = 2}, {.context = 2}, {.pipeline = 2}, {.pipeline = 2, .virtual_stages = 2}, {.expert = 2}};
  for (const ParallelSection& layout : layouts) {
    SCOPED_TRACE(text("tensor ", layout.tensor, ", context ", layout.context, ", pipeline ", layout.pipeline, " x ", layout.virtual_stages));
    for (TinyModel m : {model("tied"), model("mixed")}) {
      const Scratch scratch;
      m.run.balance = {.aux = 0.05, .z = 0.01};
      m.run.parallel = layout;
      m.run.data.train = {{1.0, write_documents(scratch, words())}};
      TinyTraining plain(m, m.run);
      write_mask(scratch, mask_of(words(), [](int64_t) { return true; }));
      TinyTraining masked(m, m.run);
      for (int64_t step = 0; step < 3; ++step) {
        const StepReport a = plain.step(), b = masked.step();
        EXPECT_EQ(a.loss, b.loss);
        EXPECT_EQ(a.gradient_norm, b.gradient_norm);
        EXPECT_FALSE(a.learned.has_value());
        EXPECT_EQ(b.learned, m.run.train.global_batch * m.run.train.sequence);
      }
      EXPECT_EQ(plain.trainer().validate(plain.sampler(), 2), masked.trainer().validate(masked.sampler(), 2));
      expect_same_bits(plain, gradients_of(plain), gradients_of(masked));
      expect_same_bits(plain, values_of(plain), values_of(masked));
    }
  }
}

// One word of one document is learned; whole steps go by without it.
TEST(LossMask, AStepThatTeachesNothing) {
  TinyModel m = model("tied");
  const Scratch scratch;
  Documents text = words();
  text.at(29).at(5) = kWords;
  m.run.data.train = {{1.0, write_documents(scratch, text)}};
  write_mask(scratch, mask_of(text, [](int64_t token) { return token == kWords; }));
  TinyTraining training(m, m.run);
  const int64_t batch = m.run.train.global_batch;
  ASSERT_EQ(training.sampler().learned(0, batch), 0) << "take another seed";
  EXPECT_TRUE(std::isnan(training.trainer().validate(training.sampler(), 1))) << "a mean over nothing";
  const int64_t batches = 9;   // one epoch
  ASSERT_EQ(training.sampler().learned(0, batches * batch), 1);
  const double loss = training.trainer().validate(training.sampler(), batches);

  const std::vector<Tensor> before = values_of(training);
  int64_t step = 0;
  for (; training.sampler().learned(step * batch, batch) == 0; ++step) {
    const StepReport report = training.step();
    EXPECT_EQ(report.learned, 0);
    EXPECT_TRUE(std::isnan(report.loss));
    EXPECT_EQ(report.gradient_norm, 0.0);
    EXPECT_FALSE(report.skipped);
    expect_same_bits(training, before, values_of(training));
  }
  const StepReport report = training.step();
  EXPECT_EQ(report.learned, 1);
  EXPECT_NEAR(report.loss, loss, 1e-6 * loss) << "the weights are those of the beginning";
  EXPECT_GT(report.gradient_norm, 0.0);

  m.run.balance.aux = 0.05;
  TinyTraining balanced(m, m.run);
  const StepReport other = balanced.step();
  EXPECT_TRUE(std::isnan(other.loss));
  EXPECT_GT(other.gradient_norm, 0.0) << "routers are kept in balance by all tokens";
}

}  // namespace
}  // namespace upcycle
