#include "cli/slurm_job.hpp"

#include <gtest/gtest.h>

#include <cstdlib>

namespace upcycle {
namespace {

using Names = std::vector<std::string>;

TEST(SlurmJob, NodeNames) {
  EXPECT_EQ(slurm::node_names("n1"), Names{"n1"});
  EXPECT_EQ(slurm::node_names("n[1-3,7],gpu09"), (Names{"n1", "n2", "n3", "n7", "gpu09"}));
  EXPECT_EQ(slurm::node_names("node[008-011]"), (Names{"node008", "node009", "node010", "node011"}));
  EXPECT_EQ(slurm::node_names("r[0-1]n[1-2]-ib"), (Names{"r0n1-ib", "r0n2-ib", "r1n1-ib", "r1n2-ib"}));
  for (const char* list : {"", "n[1-", "n[1-3", "n]1[", "n[3-1]", "n[a-b]", "n[1-999999999]", "n1,,n2", "n[]"}) EXPECT_EQ(slurm::node_names(list), Names{}) << list;
}

TEST(SlurmJob, NodesOfTasks) {
  EXPECT_EQ(slurm::nodes_of_tasks("n[1-3]", "2(x2),1"), (Names{"n1", "n1", "n2", "n2", "n3"}));
  EXPECT_EQ(slurm::nodes_of_tasks("n4", "3"), (Names{"n4", "n4", "n4"}));
  for (const char* tasks : {"", "2", "2(x4)", "2(x3", "x", "2(x3),", "-1(x3)"}) EXPECT_EQ(slurm::nodes_of_tasks("n[1-3]", tasks), Names{}) << tasks;
}

TEST(SlurmJob, TheStepSpeaksBeforeTheJob) {
  const auto forget = [] {
    for (const char* name : {"SLURM_STEP_NODELIST", "SLURM_STEP_TASKS_PER_NODE", "SLURM_JOB_NODELIST", "SLURM_TASKS_PER_NODE"}) unsetenv(name);
  };
  forget();
  EXPECT_EQ(slurm::nodes_of_tasks(), Names{});
  setenv("SLURM_JOB_NODELIST", "n[1-2]", 1);
  setenv("SLURM_TASKS_PER_NODE", "1(x2)", 1);
  EXPECT_EQ(slurm::nodes_of_tasks(), (Names{"n1", "n2"}));
  setenv("SLURM_STEP_NODELIST", "n2", 1);
  setenv("SLURM_STEP_TASKS_PER_NODE", "2", 1);
  EXPECT_EQ(slurm::nodes_of_tasks(), (Names{"n2", "n2"}));
  forget();
}

}  // namespace
}  // namespace upcycle
