#include "parallel/gpu_sharing.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "support/scratch.hpp"

namespace upcycle {
namespace {

TEST(GpuSharing, RanksOfOneHostAndOneGpu) {
  const std::vector<std::string> places = {"n1 GPU-a", "n1 GPU-b", "n2 GPU-a", "n1 GPU-a", "n1 GPU-b", "n1 GPU-a", "n2 GPU-c"};
  const std::vector<std::string> shared = shared_gpus(places);
  EXPECT_EQ(shared, (std::vector<std::string>{"ranks 0, 3 and 5 of host n1 share one GPU (GPU-a)", "ranks 1 and 4 of host n1 share one GPU (GPU-b)"}));
  const std::string refusal = user_error([&] { refuse_shared_gpus(shared); });
  for (const char* words : {"there are more ranks than GPUs:\n  ranks 0, 3 and 5 of host n1", "\n  ranks 1 and 4", "run.share_gpu = true"}) {
    EXPECT_THAT(refusal, testing::HasSubstr(words));
  }
}

TEST(GpuSharing, GpusOfTheSameNameOnOtherHostsAreOthers) {
  EXPECT_TRUE(shared_gpus(std::vector<std::string>{"n1 GPU-a", "n2 GPU-a", "n1 GPU-b"}).empty());
  refuse_shared_gpus(std::vector<std::string>{});
}

}  // namespace
}  // namespace upcycle
