#include "base/cpu_binding.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sched.h>

namespace upcycle {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;

TEST(CpuBinding, Ranges) {
  EXPECT_EQ(ranges({}), "");
  EXPECT_EQ(ranges({5}), "5");
  EXPECT_EQ(ranges({0, 1, 2, 3, 8}), "0-3,8");
  EXPECT_EQ(ranges({1, 2, 7, 9, 10, 11}), "1,2,7,9-11");
}

TEST(CpuBinding, OfThisProcess) {
  const std::vector<int> before = bound_cpus();
  ASSERT_FALSE(before.empty());
  cpu_set_t one, all;
  sched_getaffinity(0, sizeof all, &all);
  CPU_ZERO(&one);
  CPU_SET(before.back(), &one);
  ASSERT_EQ(sched_setaffinity(0, sizeof one, &one), 0);
  EXPECT_THAT(bound_cpus(), ElementsAre(before.back()));
  sched_setaffinity(0, sizeof all, &all);
  EXPECT_EQ(bound_cpus(), before);
}

TEST(CpuBinding, OddOnesAreTold) {
  EXPECT_THAT(odd_bindings({{0, {0, 1}}, {1, {2, 3}}}), IsEmpty());
  EXPECT_THAT(odd_bindings({{0, {0, 1, 2, 3}}, {1, {0, 1, 2, 3}}}), IsEmpty()) << "not bound";
  EXPECT_THAT(odd_bindings({{4, {0}}, {5, {0}}}), ElementsAre("ranks 4,5 have CPU 0 together: 2 ranks on 1 CPU"));
  EXPECT_THAT(odd_bindings({{0, {0, 1, 2}}, {1, {2, 3}}, {2, {7}}}), ElementsAre("rank 0 and rank 1 overlap on CPUs 2"));
  EXPECT_THAT(odd_bindings({{0, {0, 1}}, {1, {0, 1}}, {2, {2, 3}}}), ElementsAre("ranks 0,1 are bound to the same CPUs 0,1, other ranks of the node to others"));
}

}  // namespace
}  // namespace upcycle
