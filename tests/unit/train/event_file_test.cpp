#include "train/event_file.hpp"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <cstring>

#include "base/fault.hpp"
#include "support/scratch.hpp"

namespace upcycle {
namespace {

template <class Integer>
Integer number_at(const std::string& bytes, size_t at) {
  Integer value;
  std::memcpy(&value, bytes.data() + at, sizeof value);   // this machine is little-endian
  return value;
}

uint32_t masked(std::string_view bytes) {
  const uint32_t crc = crc32c(bytes);
  return (crc >> 15 | crc << 17) + 0xa282ead8u;
}

/// The data of each record; fails where the framing is wrong.
std::vector<std::string> records(const std::filesystem::path& path) {
  const std::string bytes = contents(path);
  std::vector<std::string> out;
  for (size_t at = 0; at < bytes.size();) {
    const auto size = number_at<uint64_t>(bytes, at);
    EXPECT_EQ(number_at<uint32_t>(bytes, at + 8), masked(bytes.substr(at, 8)));
    out.push_back(bytes.substr(at + 12, size));
    EXPECT_EQ(number_at<uint32_t>(bytes, at + 12 + size), masked(out.back()));
    at += 16 + size;
  }
  return out;
}

// RFC 3720, appendix B.4, and the usual check value.
TEST(EventFile, Crc32c) {
  EXPECT_EQ(crc32c(""), 0u);
  EXPECT_EQ(crc32c("123456789"), 0xe3069283u);
  EXPECT_EQ(crc32c(std::string(32, '\0')), 0x8a9136aau);
  EXPECT_EQ(crc32c(std::string(32, '\xff')), 0x62a8ab43u);
}

TEST(EventFile, EachEventIsInTheFileAtOnce) {
  Scratch scratch;
  EventFile file(scratch / "tensorboard", 301);
  std::vector<std::string> all = records(file.path());
  ASSERT_EQ(all.size(), 2u);
  EXPECT_EQ(all[0].substr(9), std::string("\x10\x00\x1a\x0d", 4) + "brain.Event:2");   // step 0; file_version
  EXPECT_EQ(all[1].substr(9), "\x10\xad\x02\x3a\x02\x08\x01");                         // step 301 = 0b10'0101101; session_log {START}
  EXPECT_GT(std::bit_cast<double>(number_at<uint64_t>(all[1], 1)), 1.7e9);             // wall time: after 2023
  file.add(302, {{"a/b", 0.5}, {"c", NAN}});
  all = records(file.path());
  ASSERT_EQ(all.size(), 3u);
  const std::string wanted("\x10\xae\x02\x2a\x16\x0a\x0a\x0a\x03" "a/b\x15\x00\x00\x00\x3f\x0a\x08\x0a\x01" "c\x15", 23);
  EXPECT_EQ(all[2].substr(9, 23), wanted);
  EXPECT_TRUE(std::isnan(std::bit_cast<float>(number_at<uint32_t>(all[2], 32))));
  EXPECT_EQ(all[2].size(), 36u);
}

// Readers take files by name; a start in the same second, or after the clock went back, must come behind.
TEST(EventFile, ALaterFileSortsBehind) {
  Scratch scratch;
  const EventFile first(scratch.path(), 0), second(scratch.path(), 5);
  EXPECT_LT(first.path().filename(), second.path().filename());
  store(scratch / "events.out.tfevents.4102444800.future.1.0", "");   // the year 2100
  EXPECT_TRUE(EventFile(scratch.path(), 9).path().filename().string().starts_with("events.out.tfevents.4102444801."));
  EXPECT_EQ(records(first.path()).size(), 2u);
}

TEST(EventFile, WhereItCannotBe) {
  Scratch scratch;
  store(scratch / "tensorboard", "a file");
  try {
    EventFile(scratch / "tensorboard", 0);
    ADD_FAILURE();
  } catch (const LonelyMistake& error) {
    EXPECT_NE(std::string(error.what()).find("tensorboard/events.out.tfevents."), std::string::npos) << error.what();
  }
}

}  // namespace
}  // namespace upcycle
