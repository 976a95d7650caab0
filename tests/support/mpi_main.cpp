#include <gtest/gtest.h>

#include <iostream>
#include <memory>

#include "base/error.hpp"
#include "base/log.hpp"
#include "parallel/communicator.hpp"
#include "parallel/mesh.hpp"

/// GoogleTest's main for tests on several MPI ranks. Every rank runs every test, and a test has one verdict: it failed
/// if it failed on any rank. Rank 0 prints the usual listing; the others print their failures only, with their rank.
/// What a rank can't go on from (ASSERT_*, an exception that leaves a test) ends the whole job, for its peers may be
/// waiting for it in a collective. When every test was skipped the exit code is 77, which CTest reports as Skipped.
namespace upcycle {
namespace {

class OneVerdict final : public testing::EmptyTestEventListener {
 public:
  explicit OneVerdict(const Communicator& world) : world_(world) {}

  void OnTestPartResult(const testing::TestPartResult& part) override {
    if (!part.failed()) return;
    if (world_.rank() != 0) {
      std::cerr << text("[rank ", world_.rank(), "] ", part.file_name() ? part.file_name() : "?", ':',
                        part.line_number(), ": Failure\n", part.summary(), '\n')
                << std::flush;
    }
    if (part.fatally_failed() && world_.size() > 1) {
      std::cerr << text("[rank ", world_.rank(), "] fatal failure: the job ends here\n") << std::flush;
      std::cout << std::flush;
      abort_all_ranks(1);
    }
  }

  void OnTestEnd(const testing::TestInfo& test) override {
    const std::vector<int64_t> failed = world_.all_gather(test.result()->Failed() ? 1 : 0);
    if (failed[static_cast<size_t>(world_.rank())]) return;
    for (size_t rank = 0; rank < failed.size(); ++rank) {
      if (!failed[rank]) continue;
      if (world_.rank() == 0) ADD_FAILURE() << "failed on rank " << rank;
      failed_elsewhere_ = true;
    }
  }

  bool failed_elsewhere() const { return failed_elsewhere_; }

 private:
  const Communicator& world_;
  bool failed_elsewhere_ = false;
};

bool all_skipped() {
  const testing::UnitTest& run = *testing::UnitTest::GetInstance();
  return run.skipped_test_count() > 0 && run.skipped_test_count() == run.test_to_run_count();
}

int run_tests(const Communicator& world) {
  testing::TestEventListeners& listeners = testing::UnitTest::GetInstance()->listeners();
  if (world.rank() != 0) delete listeners.Release(listeners.default_result_printer());
  const auto verdict = new OneVerdict(world);  // owned by GoogleTest
  listeners.Append(verdict);
  const bool failed = RUN_ALL_TESTS() != 0 || verdict->failed_elsewhere();
  if (world.all_reduce(failed ? 1 : 0, Reduce::max) != 0) return 1;
  return world.all_reduce(all_skipped() ? 1 : 0, Reduce::min) != 0 ? 77 : 0;
}

}  // namespace
}  // namespace upcycle

int main(int argc, char** argv) {
  using namespace upcycle;
  testing::InitGoogleTest(&argc, argv);
  GTEST_FLAG_SET(catch_exceptions, false);  // one that leaves a test must end the job, not just the test
  try {
    const MpiSession session(&argc, &argv);
    try {
      const Communicator world = Communicator::everyone();
      log::start(log::Level::info, world.rank());
      return run_tests(world);
    } catch (const std::exception& error) {
      std::cerr << text("[rank ", world_rank(), "] exception: ", error.what(), '\n') << std::flush;
      abort_all_ranks(1);
    }
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
