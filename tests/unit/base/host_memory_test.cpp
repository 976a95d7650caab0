// What a process may still take, on made-up systems: /proc/meminfo, and control groups of both versions.
#include "base/host_memory.hpp"

#include <gtest/gtest.h>

#include "support/scratch.hpp"

namespace upcycle {
namespace {

constexpr uint64_t kMiB = uint64_t{1} << 20, kGiB = uint64_t{1} << 30;

/// A system with 64 GiB available, but for what its control groups say.
class HostMemory : public testing::Test {
 protected:
  void SetUp() override { file("proc/meminfo", "MemTotal:       131072000 kB\nMemFree:         1024 kB\nMemAvailable:   67108864 kB\nBuffers:  4 kB\n"); }

  void file(const std::string& path, const std::string& content) { store(root_ / path, content); }
  void group(const std::string& path, const std::string& most, uint64_t used, uint64_t cache = 0) {
    const std::string folder = "sys/fs/cgroup/" + path;
    file(folder + "/memory.max", most + "\n");
    file(folder + "/memory.current", text(used, "\n"));
    file(folder + "/memory.stat", text("anon 1\ninactive_file ", cache, "\nactive_file 99999999\n"));
  }
  void old_group(const std::string& path, uint64_t most, uint64_t used, uint64_t cache = 0) {
    const std::string folder = "sys/fs/cgroup/memory/" + path;
    file(folder + "/memory.limit_in_bytes", text(most, "\n"));
    file(folder + "/memory.usage_in_bytes", text(used, "\n"));
    file(folder + "/memory.stat", text("inactive_file 99999999\ntotal_inactive_file ", cache, "\n"));
  }
  uint64_t available() const { return available_host_memory_below(root_.path()); }

 private:
  Scratch root_;
};

TEST_F(HostMemory, WithoutControlGroupsIsWhatTheSystemSays) {
  EXPECT_EQ(available(), 64 * kGiB);
  file("proc/self/cgroup", "0::/\n");
  EXPECT_EQ(available(), 64 * kGiB) << "the root of version 2 has no limit, and no files that tell of one";
}

TEST_F(HostMemory, OfAGroupIsWhatItsLimitLeaves) {
  file("proc/self/cgroup", "0::/job\n");
  group("job", text(8 * kGiB), 3 * kGiB);
  EXPECT_EQ(available(), 5 * kGiB);
  group("job", text(8 * kGiB), 3 * kGiB, kGiB);
  EXPECT_EQ(available(), 6 * kGiB) << "page cache is given up first";
  group("job", text(8 * kGiB), 9 * kGiB);
  EXPECT_EQ(available(), 0u) << "above its limit";
  group("job", text(8 * kGiB), kMiB, 2 * kMiB);
  EXPECT_EQ(available(), 8 * kGiB) << "the two numbers are not of the same moment";
  group("job", text(800 * kGiB), kGiB);
  EXPECT_EQ(available(), 64 * kGiB) << "the system has less";
}

TEST_F(HostMemory, NoLimitIsNone) {
  file("proc/self/cgroup", "0::/job\n");
  group("job", "max", 3 * kGiB);
  EXPECT_EQ(available(), 64 * kGiB);
}

TEST_F(HostMemory, OfNestedGroupsTheTightestCounts) {
  file("proc/self/cgroup", "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n");
  const std::string job = "system.slice/slurmstepd.scope/job_7";
  group(job + "/step_0/user/task_0", "max", kGiB);
  group(job + "/step_0", text(40 * kGiB), 2 * kGiB);
  group(job, text(32 * kGiB), 20 * kGiB, 2 * kGiB);   // another step's, too
  group("system.slice", "max", 50 * kGiB);
  EXPECT_EQ(available(), 14 * kGiB);
  group(job + "/step_0/user/task_0", text(4 * kGiB), kGiB);
  EXPECT_EQ(available(), 3 * kGiB);
  group("system.slice", text(51 * kGiB), 50 * kGiB);
  EXPECT_EQ(available(), kGiB);
  group("", text(kMiB), 0);   // in a container the root is some group of the host's
  EXPECT_EQ(available(), kMiB);
}

TEST_F(HostMemory, OfVersionOneIsThatOfTheMemoryController) {
  file("proc/self/cgroup", "12:cpuset:/elsewhere\n5:cpu,memory:/slurm/job_7\n3:memory_of_others:/elsewhere\n1:name=systemd:/elsewhere\n0::/elsewhere\n");
  old_group("elsewhere", kMiB, 0);
  EXPECT_EQ(available(), 64 * kGiB) << "a path of other controllers";
  old_group("slurm/job_7", 0x7ffffffffffff000, 3 * kGiB);   // as version 1 writes that there is no limit
  EXPECT_EQ(available(), 64 * kGiB);
  old_group("slurm/job_7", 16 * kGiB, 8 * kGiB, kGiB);
  EXPECT_EQ(available(), 9 * kGiB);
  old_group("slurm", 10 * kGiB, 8 * kGiB);
  EXPECT_EQ(available(), 2 * kGiB);
}

TEST_F(HostMemory, OfBothVersionsTheTighterCounts) {
  file("proc/self/cgroup", "4:memory:/old\n0::/new\n");
  old_group("old", 16 * kGiB, 8 * kGiB);
  group("new", text(9 * kGiB), 8 * kGiB);
  EXPECT_EQ(available(), kGiB);
}

// In a container without a namespace of its own the path is the host's, and its own limit lies at the root.
TEST_F(HostMemory, OfAPathThatIsNotThereIsThatOfTheRoot) {
  file("proc/self/cgroup", "0::/kubepods/pod-1/of-the-host\n");
  group("", text(6 * kGiB), kGiB);
  EXPECT_EQ(available(), 5 * kGiB);
  file("proc/self/cgroup", "0::/../../of-a-sibling\n");
  EXPECT_EQ(available(), 5 * kGiB);
}

TEST(HostMemoryHere, IsSomethingAndNoMoreThanTheSystemHas) {
  EXPECT_GT(available_host_memory(), 100 * kMiB);
  EXPECT_LT(available_host_memory(), uint64_t{1} << 50);
}

}  // namespace
}  // namespace upcycle
