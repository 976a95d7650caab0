#include "train/agreement.hpp"

#include <gtest/gtest.h>

#include <cstdlib>

#include "support/scratch.hpp"

namespace upcycle {
namespace {

/// The message of check_world_size in an environment where the launchers have set these variables alone.
std::string refusal(const std::vector<std::pair<std::string, std::string>>& variables, int world) {
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"}) unsetenv(name);
  for (const auto& [name, value] : variables) setenv(name.c_str(), value.c_str(), 1);
  return user_error([&] { check_world_size(world); });
}

TEST(WorldSize, JobsOfOneRankAreRefused) {
  EXPECT_EQ(refusal({}, 1), "");
  EXPECT_EQ(refusal({{"PMI_SIZE", "4"}}, 4), "");
  EXPECT_EQ(refusal({{"OMPI_COMM_WORLD_SIZE", "1"}, {"SLURM_STEP_NUM_TASKS", "8"}}, 1), "") << "mpirun -n 1 inside of a step";
  const std::string message = refusal({{"SLURM_STEP_NUM_TASKS", "8"}}, 1);
  EXPECT_NE(message.find("started 8 ranks (SLURM_STEP_NUM_TASKS = 8), but MPI sees 1: they would be 8 jobs of one rank each"), std::string::npos)
      << message;
}

TEST(WorldSize, SmallerWorldsAreRefused) {
  EXPECT_NE(refusal({{"SLURM_STEP_NUM_TASKS", "8"}}, 4).find("started 8 ranks (SLURM_STEP_NUM_TASKS = 8), but MPI sees 4: they would be several jobs"),
            std::string::npos);
  EXPECT_EQ(refusal({{"OMPI_COMM_WORLD_SIZE", "8"}, {"SLURM_STEP_NUM_TASKS", "2"}}, 8), "") << "mpirun's daemons are the tasks of its step";
}

TEST(FactsOfADirectory, ChangeWithEveryFileThatASampleCanSee) {
  const Scratch scratch;
  const auto facts = [&] { return facts_of_directory("source.model", scratch.path()); };
  EXPECT_EQ(facts(), (Facts{{"source.model, " + scratch.path().string(), "not a directory with files"}}));
  store(scratch / "config.json", "{}");
  store(scratch / "model.safetensors", std::string(3 << 20, 'x'));
  const Facts before = facts();
  ASSERT_EQ(before.size(), 2u);
  EXPECT_EQ(before[1].first, "source.model, " + (scratch / "model.safetensors").string());
  EXPECT_EQ(before[1].second.find("3145728 bytes, digest "), 0u);
  EXPECT_EQ(facts(), before);
  for (const size_t place : {size_t{0}, size_t{(3 << 20) - 1}}) {
    std::string content(3 << 20, 'x');
    content[place] = 'y';
    store(scratch / "model.safetensors", content);
    EXPECT_NE(facts()[1], before[1]) << place;
    EXPECT_EQ(facts()[0], before[0]);
  }
  store(scratch / "config.json", "{ }");
  EXPECT_NE(facts()[0], before[0]);
}

}  // namespace
}  // namespace upcycle
