#include "checkpoint/file_in_memory.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>

#include "support/scratch.hpp"

namespace upcycle {
namespace {

std::span<const std::byte> bytes_of(const std::string& words) { return std::as_bytes(std::span(words)); }

std::string read(const FileInMemory& file, uint64_t offset, size_t size) {
  std::string out(size, '?');
  return file.read(std::as_writable_bytes(std::span(out)), offset) ? out : "refused";
}

TEST(FileInMemory, HoldsWhatIsWrittenAndZeros) {
  const Scratch scratch;
  FileInMemory file;
  file.write(bytes_of("begin"), 0);
  file.write(bytes_of("over a border"), FileInMemory::kPage - 4);
  file.write(bytes_of("far"), uint64_t{1} << 24);
  EXPECT_EQ(read(file, FileInMemory::kPage - 5, 8), std::string("\0over a ", 8));
  EXPECT_EQ(file.size(), (uint64_t{1} << 24) + 3);
  file.resize((uint64_t{1} << 24) + 2);
  file.store(scratch / "f");
  std::string expected((1 << 24) + 2, '\0');
  expected.replace(0, 5, "begin").replace(FileInMemory::kPage - 4, 13, "over a border").replace(1 << 24, 2, "fa");
  EXPECT_TRUE(contents(scratch / "f") == expected);
  struct stat told{};
  ASSERT_EQ(::stat((scratch / "f").c_str(), &told), 0);
  EXPECT_GE(told.st_blocks * 512, 1 << 24) << "its room is reserved";
  file.resize(FileInMemory::kPage - 2);
  file.resize(2 * FileInMemory::kPage);
  EXPECT_EQ(read(file, FileInMemory::kPage - 4, 6), std::string("ov\0\0\0\0", 6)) << "what was cut off stays away";
}

TEST(FileInMemory, PagesComeFromWhereTheyLie) {
  bool there = true;
  FileInMemory file([&](uint64_t offset, std::span<std::byte> page) {
    std::fill(page.begin(), page.end(), static_cast<std::byte>('a' + offset / FileInMemory::kPage));
    return there;
  });
  EXPECT_EQ(read(file, FileInMemory::kPage - 1, 2), "ab");
  EXPECT_TRUE(file.write(bytes_of("X"), FileInMemory::kPage - 1));
  EXPECT_EQ(read(file, FileInMemory::kPage - 2, 3), "aXb");
  there = false;
  EXPECT_EQ(read(file, 1, 2), "aa") << "is here already";
  EXPECT_EQ(read(file, FileInMemory::kPage, 1), "refused");
  EXPECT_FALSE(file.write(bytes_of("X"), FileInMemory::kPage));
  EXPECT_FALSE(file.write(bytes_of("Y"), FileInMemory::kPage)) << "half a page is no page";
}

}  // namespace
}  // namespace upcycle
