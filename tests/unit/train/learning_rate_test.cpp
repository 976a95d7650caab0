#include "train/learning_rate.hpp"

#include <gtest/gtest.h>

#include <cmath>

namespace upcycle {
namespace {

OptimizerSection settings(Schedule schedule) {
  OptimizerSection o;
  o.lr = 1e-3;
  o.min_lr = 1e-4;
  o.schedule = schedule;
  o.warmup = 10;
  o.decay = 20;
  return o;
}

TEST(LearningRate, WarmsUpLinearlyFromTheFirstUpdate) {
  for (const Schedule s : {Schedule::constant, Schedule::linear, Schedule::cosine, Schedule::inverse_sqrt, Schedule::wsd}) {
    EXPECT_DOUBLE_EQ(learning_rate(settings(s), 100, 1), 1e-4);
    EXPECT_DOUBLE_EQ(learning_rate(settings(s), 100, 5), 5e-4);
    EXPECT_DOUBLE_EQ(learning_rate(settings(s), 100, 10), 1e-3);
  }
}

TEST(LearningRate, ConstantStays) { EXPECT_DOUBLE_EQ(learning_rate(settings(Schedule::constant), 100, 100), 1e-3); }

TEST(LearningRate, LinearAndCosineEndAtTheMinimumAndMeetHalfWay) {
  for (const Schedule s : {Schedule::linear, Schedule::cosine}) {
    EXPECT_NEAR(learning_rate(settings(s), 100, 55), 5.5e-4, 1e-12);  // half of what follows the warm-up
    EXPECT_NEAR(learning_rate(settings(s), 100, 100), 1e-4, 1e-12);
    EXPECT_NEAR(learning_rate(settings(s), 100, 120), 1e-4, 1e-12);   // past the end: the minimum
  }
  EXPECT_GT(learning_rate(settings(Schedule::cosine), 100, 30), learning_rate(settings(Schedule::linear), 100, 30));
}

TEST(LearningRate, InverseSquareRootFallsFromTheWarmUp) {
  const OptimizerSection o = settings(Schedule::inverse_sqrt);
  EXPECT_NEAR(learning_rate(o, 10000, 40), 1e-3 * std::sqrt(10.0 / 40.0), 1e-12);
  EXPECT_DOUBLE_EQ(learning_rate(o, 10000000, 5000000), 1e-4);
}

TEST(LearningRate, WarmupStableDecayHoldsThenDescends) {
  const OptimizerSection o = settings(Schedule::wsd);
  EXPECT_DOUBLE_EQ(learning_rate(o, 100, 80), 1e-3);
  EXPECT_NEAR(learning_rate(o, 100, 90), 5.5e-4, 1e-12);
  EXPECT_NEAR(learning_rate(o, 100, 100), 1e-4, 1e-12);
}

TEST(LearningRate, WithoutWarmUpStartsAtThePeak) {
  OptimizerSection o = settings(Schedule::constant);
  o.warmup = 0;
  EXPECT_DOUBLE_EQ(learning_rate(o, 100, 1), 1e-3);
}

}  // namespace
}  // namespace upcycle
