#include <gtest/gtest.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <fstream>

#include "base/error.hpp"
#include "base/log.hpp"
#include "base/mapped_file.hpp"
#include "base/shutdown.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;

class Folder : public testing::Test {
 protected:
  void SetUp() override {
    std::string name = (fs::temp_directory_path() / "upcycle-base-XXXXXX").string();
    ASSERT_NE(mkdtemp(name.data()), nullptr);
    path_ = name;
  }
  void TearDown() override { fs::remove_all(path_); }
  fs::path file(const std::string& name, const std::string& content) const {
    std::ofstream(path_ / name, std::ios::binary) << content;
    return path_ / name;
  }
  fs::path path_;
};

template <class Action>
std::string user_error(Action&& action) {
  try {
    action();
  } catch (const UserError& error) {
    return error.what();
  }
  return "no UserError";
}

using MappedFileTest = Folder;

TEST_F(MappedFileTest, ShowsTheBytesAndMoves) {
  const fs::path path = file("data.bin", std::string("ab\0cd", 5));
  MappedFile first(path);
  MappedFile map(std::move(first));
  EXPECT_EQ(first.bytes().size(), 0u);
  ASSERT_EQ(map.bytes().size(), 5u);
  EXPECT_EQ(map.bytes()[4], std::byte{'d'});
  EXPECT_EQ(map.path(), path);
  MappedFile other(file("other.bin", "xyz"));
  other = std::move(map);
  EXPECT_EQ(other.bytes()[0], std::byte{'a'});
}

TEST_F(MappedFileTest, EmptyFileIsAnEmptySpan) { EXPECT_TRUE(MappedFile(file("empty", "")).bytes().empty()); }

TEST_F(MappedFileTest, NamesWhatCannotBeOpened) {
  EXPECT_NE(user_error([&] { MappedFile map(path_ / "absent"); }).find("absent: cannot be opened: No such file"),
            std::string::npos);
  EXPECT_NE(user_error([&] { MappedFile map(path_); }).find("is not a regular file"), std::string::npos);
}

TEST(Shutdown, ASignalSetsTheFlagAndTheFirstOneIsRemembered) {
  shutdown::listen("USR2");
  EXPECT_FALSE(shutdown::requested());
  EXPECT_EQ(shutdown::signal(), 0);
  raise(SIGUSR2);
  EXPECT_TRUE(shutdown::requested());
  raise(SIGTERM);
  EXPECT_EQ(shutdown::signal(), SIGUSR2);
}

TEST(Shutdown, RefusesUnknownNames) {
  EXPECT_NE(user_error([] { shutdown::listen("KILL"); }).find("\"KILL\": choose USR1"), std::string::npos);
}

std::string logged(log::Level level, int rank) {
  log::start(level, rank);
  testing::internal::CaptureStderr();
  log::debug("detail");
  log::info("news {}");  // braces are text, not a format
  log::warning("careful");
  log::error("broken");
  log::progress("10 %");
  return testing::internal::GetCapturedStderr();
}

TEST(Log, RankZeroSpeaksForAll) {
  const std::string all = logged(log::Level::debug, 0);
  EXPECT_NE(all.find("debug: detail"), std::string::npos);
  EXPECT_NE(all.find("news {}"), std::string::npos);
  EXPECT_NE(all.find("warning: careful"), std::string::npos);
  EXPECT_NE(all.find("error: broken"), std::string::npos);

  const std::string other = logged(log::Level::debug, 3);
  EXPECT_EQ(other.find("news"), std::string::npos);
  EXPECT_EQ(other.find("10 %"), std::string::npos);
  EXPECT_NE(other.find("warning: rank 3: careful"), std::string::npos);
}

TEST(Log, LevelsAreThresholds) {
  EXPECT_EQ(logged(log::level_from_name("info"), 0).find("detail"), std::string::npos);
  EXPECT_EQ(logged(log::level_from_name("warning"), 0).find("news"), std::string::npos);
  EXPECT_EQ(logged(log::level_from_name("error"), 0).find("careful"), std::string::npos);
  EXPECT_EQ(logged(log::level_from_name("off"), 0), "");
  EXPECT_EQ(log::level_from_name("debug"), log::Level::debug);
  EXPECT_NE(user_error([] { log::level_from_name("loud"); }).find("unknown log level 'loud'"), std::string::npos);
  log::start(log::Level::info, 0);
}

}  // namespace
}  // namespace upcycle
