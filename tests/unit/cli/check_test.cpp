#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "cli/check_parts.hpp"
#include "device/device.hpp"
#include "support/scratch.hpp"

namespace upcycle {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

constexpr uint64_t kGigabyte = 1'000'000'000;

CheckReport weighed(uint64_t bytes, const TimeLimit& limit, const std::vector<std::optional<double>>& disks = {1.5, 0.5}) {
  CheckReport report;
  for (const auto& speed : disks) report.nodes.emplace_back().disk = speed;
  weigh_time(report, bytes, limit);
  return report;
}

TEST(CheckTime, ASaveThatFits) {
  const CheckReport report = weighed(100 * kGigabyte, {.left = 43100, .lead = 180});
  EXPECT_DOUBLE_EQ(report.seconds_to_save.value(), 50) << "all nodes write at once";
  EXPECT_DOUBLE_EQ(report.seconds_left.value(), 43100);
  EXPECT_EQ(report.time, "a checkpoint (100.0 GB) takes about 50 s at the 2 GB/s of all nodes; Slurm ends this job in 12.0 h, and asks it to save 3 min before the end");
  EXPECT_THAT(report.problems, IsEmpty());
  EXPECT_THAT(report.notes, IsEmpty());
}

TEST(CheckTime, ALimitShorterThanASaveIsRefused) {
  EXPECT_THAT(weighed(100 * kGigabyte, {.left = 50.1}).problems, IsEmpty());
  for (const double left : {50.0, 20.0, -5.0}) {
    const CheckReport report = weighed(100 * kGigabyte, {.left = left, .lead = 180});
    EXPECT_THAT(report.problems, ElementsAre(testing::AllOf(HasSubstr("shorter than a save"), HasSubstr("(100.0 GB) takes about 50 s at the 2 GB/s"), HasSubstr("sbatch --time"))));
    EXPECT_THAT(report.notes, IsEmpty()) << "said once";
  }
}

TEST(CheckTime, ASignalThatComesTooLateIsTold) {
  EXPECT_THAT(weighed(360 * kGigabyte, {.left = 43100, .lead = 180}).notes, IsEmpty());
  const CheckReport report = weighed(362 * kGigabyte, {.left = 43100, .lead = 180});
  EXPECT_THAT(report.problems, IsEmpty());
  EXPECT_THAT(report.notes, ElementsAre(testing::AllOf(HasSubstr("takes about 3 min"), HasSubstr("only 3 min before"), HasSubstr("--signal=B:USR2@300"))));
  EXPECT_THAT(weighed(362 * kGigabyte, {.lead = 180}).notes, testing::SizeIs(1)) << "also where the time limit is not known";
}

TEST(CheckTime, ASignalThatComesAtOnceIsTold) {
  EXPECT_THAT(weighed(kGigabyte, {.left = 181, .lead = 180}).notes, IsEmpty());
  EXPECT_THAT(weighed(kGigabyte, {.left = 170, .lead = 180}).notes, ElementsAre(HasSubstr("asked as soon as it has begun")));
}

TEST(CheckTime, WithoutASpeedOrALimitNothingIsHeldAgainstThem) {
  const CheckReport unknown = weighed(kGigabyte, {.left = 1, .lead = 1}, {std::nullopt});
  EXPECT_FALSE(unknown.seconds_to_save.has_value());
  EXPECT_EQ(unknown.time, "");
  EXPECT_THAT(unknown.problems, IsEmpty());
  EXPECT_EQ(weighed(kGigabyte / 500, {}).time, "a checkpoint (0.002 GB) takes about 0.0 s at the 2 GB/s of all nodes");
}

TEST(CheckDevices, MoreTasksThanGpus) {
  RunConfig config;
  config.run.device = "cuda";
  const auto refusal = [&](int64_t tasks, int64_t nodes, int64_t gpus) { return user_error([&] { refuse_more_tasks_than_gpus(config, tasks, nodes, gpus); }); };
  EXPECT_EQ(refusal(16, 2, 8), "");
  EXPECT_EQ(refusal(8, 2, 8), "");
  EXPECT_THAT(refusal(17, 2, 8), HasSubstr("more tasks than GPUs: 17 tasks on 2 nodes of 8 GPUs each"));
  EXPECT_THAT(refusal(2, 1, 1), HasSubstr("2 tasks on 1 node of 1 GPU, which Slurm says"));
  EXPECT_EQ(refusal(17, 2, 0), "") << "a job that asked for no GPUs by Slurm's count";
  EXPECT_EQ(refusal(0, 1, 8), "");
  config.run.share_gpu = true;
  EXPECT_EQ(refusal(17, 2, 8), "");
  config.run.share_gpu = false, config.run.device = "cpu";
  EXPECT_EQ(refusal(17, 2, 8), "");
  config.run.device = "auto";
  EXPECT_EQ(refusal(17, 2, 8).empty(), !device::cuda_built_in());
}

}  // namespace
}  // namespace upcycle
