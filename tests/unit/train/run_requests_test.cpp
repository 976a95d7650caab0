#include "train/run_requests.hpp"

#include <gtest/gtest.h>

#include "base/error.hpp"
#include "support/scratch.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;

TEST(RunRequests, SaveIsRemovedWhenItsOwnCheckpointIsPublished) {
  const Scratch scratch;
  RunRequests requests(scratch.path(), true);
  requests.look();
  EXPECT_FALSE(requests.save() || requests.stop());

  store(scratch / "save", "");
  requests.look();
  EXPECT_FALSE(requests.save()) << "it has looked less than a second ago";
  RunRequests others(scratch.path(), false), fresh(scratch.path(), true);
  others.look(), fresh.look();
  EXPECT_FALSE(others.save());
  EXPECT_TRUE(fresh.save());
  fresh.published(6);
  EXPECT_TRUE(fs::exists(scratch / "save")) << "a checkpoint that was begun before";
  fresh.saving(7);
  EXPECT_FALSE(fresh.save()) << "it is under way";
  fresh.published(6);
  EXPECT_TRUE(fs::exists(scratch / "save"));
  fresh.published(7);
  EXPECT_FALSE(fs::exists(scratch / "save"));
}

TEST(RunRequests, SaveThatWasMadeAnewIsASecondWish) {
  const Scratch scratch;
  RunRequests requests(scratch.path(), true);
  store(scratch / "save", "");
  requests.look();
  requests.saving(3);
  store(scratch / "other", "again");
  fs::rename(scratch / "other", scratch / "save");
  requests.published(3);
  EXPECT_TRUE(fs::exists(scratch / "save"));
}

TEST(RunRequests, StopStopsAndKeepsFromStarting) {
  const Scratch scratch;
  refuse_stop_file(scratch.path());
  refuse_stop_file(scratch / "not/there/yet");
  store(scratch / "stop", "");
  RunRequests requests(scratch.path(), true);
  requests.look();
  EXPECT_TRUE(requests.stop());
  EXPECT_FALSE(requests.save());
  try {
    refuse_stop_file(scratch.path());
    FAIL() << "nothing was thrown";
  } catch (const UserError& error) {
    EXPECT_EQ(std::string(error.what()), (scratch / "stop").string() + " is there, which stops this run: remove it to let the run go on");
  }
}

TEST(RunRequests, Finished) {
  const Scratch scratch;
  { const Unfinished none(scratch.path()); }
  EXPECT_FALSE(fs::exists(scratch / "finished"));
  mark_finished(scratch.path(), 12);
  {
    const Unfinished start_that_fails(scratch.path());
    EXPECT_FALSE(fs::exists(scratch / "finished"));
  }
  EXPECT_EQ(contents(scratch / "finished"), "step 12\n");
  {
    Unfinished start(scratch.path());
    start.begun();
  }
  EXPECT_FALSE(fs::exists(scratch / "finished"));
}

}  // namespace
}  // namespace upcycle
