#include "train/loss_spikes.hpp"

#include <ATen/ops/scalar_tensor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "base/error.hpp"
#include "train/bad_steps.hpp"

namespace upcycle {
namespace {

Tensor scalar(double value) { return at::scalar_tensor(value, at::kDouble); }
Tensor truth(bool value) { return at::scalar_tensor(value, at::kBool); }

struct Judge {
  explicit Judge(double factor) : spikes(factor, at::kCPU) {}
  bool operator()(double loss, bool finite = true) { return spikes.judge(scalar(loss), truth(finite)).item<bool>(); }
  LossSpikes spikes;
};

// Losses that go down, with a wave on them.
double loss_of(int step) { return 3.0 - 0.004 * step + 0.1 * std::sin(step); }

/// The rule, written down with plain numbers.
bool is_spike(const std::vector<double>& window, double factor, double loss) {
  if (window.size() < 64) return false;
  const double n = static_cast<double>(window.size()), mean = std::accumulate(window.begin(), window.end(), 0.0) / n;
  double squares = 0.0;
  for (const double x : window) squares += (x - mean) * (x - mean);
  return loss > mean + factor * std::sqrt(squares / (n - 1));
}

TEST(LossSpikes, AreSoManyDeviationsAboveTheMeanOfTheGoodOnes) {
  Judge judge(3.0);
  std::vector<double> window;
  int found = 0;
  for (int step = 0; step < 400; ++step) {
    const double loss = loss_of(step) + (step % 37 == 36 ? 0.2 * (step % 11) : 0.0);
    const bool expected = is_spike(window, 3.0, loss);
    ASSERT_EQ(judge(loss), expected) << step;
    found += expected;
    if (expected) continue;
    window.push_back(loss);
    if (window.size() > 128) window.erase(window.begin());
  }
  EXPECT_GT(found, 2);
  EXPECT_LT(found, 12);
}

TEST(LossSpikes, ThereIsNoneBeforeSixtyFourGoodLosses) {
  Judge judge(6.0);
  for (int step = 0; step < 63; ++step) EXPECT_FALSE(judge(loss_of(step)));
  EXPECT_FALSE(judge(100.0, /*finite=*/false)) << "nobody knows yet; a step whose gradient was not finite is none of the 64";
  EXPECT_FALSE(judge(loss_of(63)));
  EXPECT_TRUE(judge(100.0));
}

TEST(LossSpikes, BadLossesDoNotBecomeTheCustom) {
  Judge judge(6.0);
  for (int step = 0; step < 128; ++step) judge(loss_of(step));
  const nlohmann::json before = judge.spikes.state();
  for (int step = 0; step < 500; ++step) EXPECT_TRUE(judge(9.0));
  for (int step = 0; step < 200; ++step) judge(2.5, /*finite=*/false);
  EXPECT_FALSE(judge(std::numeric_limits<double>::quiet_NaN())) << "the gradient tells of that";
  EXPECT_TRUE(judge(std::numeric_limits<double>::infinity()));
  EXPECT_EQ(judge.spikes.state(), before);
}

TEST(LossSpikes, GoOnFromWhatWasStored) {
  Judge straight(3.0), first(3.0), second(3.0);
  for (int step = 0; step < 100; ++step) EXPECT_EQ(straight(loss_of(step)), first(loss_of(step)));
  second.spikes.restore(nlohmann::json::parse(first.spikes.state().dump()));   // as a manifest has it
  EXPECT_EQ(second.spikes.state().size(), 100u);
  for (int step = 100; step < 400; ++step) {
    const double loss = loss_of(step) + (step % 41 == 0 ? 0.3 : 0.0);
    ASSERT_EQ(straight(loss), second(loss)) << step;
  }
  EXPECT_EQ(straight.spikes.state(), second.spikes.state());
  EXPECT_EQ(second.spikes.state().size(), 128u);
  second.spikes.restore(nullptr);
  EXPECT_EQ(second.spikes.state(), nlohmann::json::array());
  EXPECT_THROW(second.spikes.restore(nlohmann::json{1.0, "two"}), UserError);
}

StepReport report_of(int64_t step, bool skipped, bool spike = false) {
  StepReport report;
  report.step = step, report.position = 8 * step, report.skipped = skipped, report.spike = spike;
  return report;
}

TEST(BadSteps, AreThoseInARow) {
  TrainSection train;
  train.nan_limit = 3;
  BadSteps bad(train);
  for (const int64_t step : {1, 2}) bad.add(report_of(step, true));
  EXPECT_TRUE(bad.any());
  EXPECT_FALSE(bad.too_many());
  bad.add(report_of(3, false));
  EXPECT_FALSE(bad.any());
  for (const int64_t step : {4, 5, 6}) bad.add(report_of(step, true));
  EXPECT_TRUE(bad.too_many());
  EXPECT_EQ(bad.first(), 4);
  EXPECT_EQ(bad.last(), 6);
  EXPECT_EQ(bad.position(), 48);
  EXPECT_EQ(bad.words(), "the gradient was not finite for 3 steps in a row, last at step 6");
  bad.add(report_of(7, true, true));
  EXPECT_EQ(bad.words(), "a loss spike or a gradient that was not finite for 4 steps in a row (1 spikes), last at step 7");

  train.nan_policy = NanPolicy::stop;
  BadSteps strict(train);
  strict.add(report_of(1, true, true));
  EXPECT_TRUE(strict.too_many());
  EXPECT_EQ(strict.words(), "the loss was a spike (train.spike) for 1 steps in a row, last at step 1");
}

}  // namespace
}  // namespace upcycle
