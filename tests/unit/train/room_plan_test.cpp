#include "train/room_plan.hpp"

#include <gtest/gtest.h>

namespace upcycle {
namespace {

TEST(RoomPlan, WhatIsKeptAndOneThatIsWritten) {
  const CheckpointBytes bytes{.step_zero = 2, .full = 10};
  RunConfig run;
  run.train.steps = 1000, run.checkpoint.every = 100, run.checkpoint.keep = 3;
  const auto room = [&](int64_t done) {
    const RoomPlan plan = plan_room(run, bytes, done);
    return std::pair(plan.checkpoints, plan.bytes);
  };
  EXPECT_EQ(room(0), std::pair(int64_t{4}, uint64_t{40}));
  EXPECT_EQ(room(500), std::pair(int64_t{4}, uint64_t{40}));
  EXPECT_EQ(room(900), std::pair(int64_t{2}, uint64_t{20})) << "the last one beside that of step 900";
  EXPECT_EQ(room(1000), std::pair(int64_t{1}, uint64_t{10}));
  run.train.steps = 150;
  EXPECT_EQ(room(0), std::pair(int64_t{3}, uint64_t{22})) << "step 0, 100 and 150";
  run.train.steps = 1000, run.checkpoint.keep_best = true;
  EXPECT_EQ(room(0).first, 5);
  run.checkpoint.keep_every = 250;
  EXPECT_EQ(room(0).first, 8) << "steps 0, 500, 1000; three, the best, one being written";
  run.checkpoint.every = 0;
  EXPECT_EQ(room(0), std::pair(int64_t{2}, uint64_t{12})) << "where it stops";
}

}  // namespace
}  // namespace upcycle
