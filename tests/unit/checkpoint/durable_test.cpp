#include "checkpoint/durable.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "support/scratch.hpp"

namespace upcycle {
namespace {

using testing::HasSubstr;
namespace fs = std::filesystem;

TEST(Durable, TextIsWholeOrAbsent) {
  const Scratch scratch;
  write_text_durably(scratch / "a.json", "one");
  write_text_durably(scratch / "a.json", "two");
  EXPECT_EQ(contents(scratch / "a.json"), "two");
  fs::create_directory(scratch / "busy");
  store(scratch.path() / "busy" / "x", "");
  EXPECT_THAT(user_error([&] { write_text_durably(scratch / "busy", "three"); }), HasSubstr("renaming"));
  EXPECT_FALSE(fs::exists(scratch / "busy.partial"));
  EXPECT_THAT(user_error([&] { make_durable(scratch / "absent"); }), HasSubstr("opening"));
  // A full disk, as /dev/full plays one.
  const FileDescriptor full = create_file("/dev/full");
  EXPECT_THAT(user_error([&] { write_at(full, std::as_bytes(std::span("x", 1)), 0, "/dev/full"); }),
              testing::AllOf(HasSubstr("/dev/full: No space left on device"), HasSubstr("free some space")));
}

TEST(Durable, FreeSpaceIsComparedWithWhatIsNeeded) {
  const Scratch scratch;
  EXPECT_EQ(user_error([&] { check_free_space(scratch.path(), 1, "a byte"); }), "");
  EXPECT_EQ(user_error([&] { check_free_space(scratch.path() / "not" / "yet" / "there", 1, "a byte"); }), "");
  EXPECT_THAT(user_error([&] { check_free_space(scratch.path() / "not" / "yet", UINT64_C(1) << 62, "step 0"); }),
              testing::AllOf(HasSubstr("step 0 needs 4611686018.43 GB but " + scratch.path().string() + " has "),
                             HasSubstr("run.directory")));
}

}  // namespace
}  // namespace upcycle
