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

/// The message of check_whole_job for `command` on `world` ranks, in an environment where these variables alone are set.
std::string part_of_a_job(const std::vector<std::pair<std::string, std::string>>& variables, const std::string& command, int world) {
  const std::vector<std::string> names = {"OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_JOB_ID", "SLURM_NTASKS"};
  for (const std::string& name : names) unsetenv(name.c_str());
  for (const auto& [name, value] : variables) setenv(name.c_str(), value.c_str(), 1);
  const std::string message = user_error([&] { check_whole_job(command, world); });
  for (const std::string& name : names) unsetenv(name.c_str());
  return message;
}

TEST(WholeJob, MpirunOnOtherThanTheJobsTasksIsRefused) {
  using Variables = std::vector<std::pair<std::string, std::string>>;
  const Variables job = {{"SLURM_JOB_ID", "17"}, {"SLURM_NTASKS", "8"}};
  const auto by_mpirun = [&](const char* ranks, Variables more = {}) {
    Variables all = job;
    all.emplace_back("OMPI_COMM_WORLD_SIZE", ranks);
    all.insert(all.end(), more.begin(), more.end());
    return all;
  };
  for (const char* command : {"train", "check"}) {
    EXPECT_EQ(part_of_a_job(by_mpirun("8"), command, 8), "");
    EXPECT_NE(part_of_a_job(by_mpirun("4"), command, 4).find("mpirun started 4 ranks, but this Slurm job has 8 tasks (SLURM_NTASKS = 8): start as many (mpirun -np 8)"),
              std::string::npos);
    EXPECT_NE(part_of_a_job(by_mpirun("16"), command, 16), "");
    EXPECT_NE(part_of_a_job(by_mpirun("1"), command, 1), "");
    EXPECT_EQ(part_of_a_job(job, command, 1), "") << "without a launcher";
  }
  for (const char* command : {"convert", "export", "inspect", "verify", "sample", "evaluate"}) EXPECT_EQ(part_of_a_job(by_mpirun("4"), command, 4), "");
  EXPECT_EQ(part_of_a_job(by_mpirun("8", {{"SLURM_STEP_NUM_TASKS", "1"}, {"SLURM_NTASKS", "1"}}), "train", 8), "") << "on another node, below mpirun's daemon";
  EXPECT_EQ(part_of_a_job(by_mpirun("4", {{"SLURM_STEP_NUM_TASKS", "8"}}), "train", 4), "") << "inside of a step";
  EXPECT_EQ(part_of_a_job({{"OMPI_COMM_WORLD_SIZE", "4"}, {"SLURM_NTASKS", "8"}}, "train", 4), "") << "no job: a setting for srun";
  EXPECT_EQ(part_of_a_job({{"OMPI_COMM_WORLD_SIZE", "4"}, {"SLURM_JOB_ID", "17"}}, "train", 4), "") << "only GPUs were asked for";
  EXPECT_EQ(part_of_a_job({{"OMPI_COMM_WORLD_SIZE", "4"}, {"SLURM_JOB_ID", "17"}, {"SLURM_NTASKS", "1"}}, "train", 4), "") << "salloc --gpus=4";
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
