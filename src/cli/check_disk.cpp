#include <fcntl.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "base/error.hpp"
#include "base/process.hpp"
#include "checkpoint/durable.hpp"
#include "cli/check.hpp"

namespace upcycle {
namespace {

constexpr uint64_t kPiece = 8 << 20, kPage = 4096;

// Nameless from the start, or, where the file system can't, from the moment it is open.
FileDescriptor nameless_file(const std::filesystem::path& directory, int flags) {
  FileDescriptor file(::open(directory.c_str(), O_TMPFILE | O_WRONLY | O_CLOEXEC | flags, 0600));
  if (file || errno == EACCES || errno == ENOSPC || errno == EROFS || errno == EDQUOT) return file;
  const std::filesystem::path path = directory / text(".upcycle-check-", host_name(), "-", ::getpid());
  FileDescriptor named(::open(path.c_str(), O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC | flags, 0600));
  const int error = errno;
  if (named || error == EINVAL) ::unlink(path.c_str());
  errno = error;
  return named;
}

}  // namespace

double disk_speed(const std::filesystem::path& run_directory) {
  const std::filesystem::path directory = existing_part(run_directory);
  FileDescriptor file = nameless_file(directory, O_DIRECT);
  if (!file && errno == EINVAL) file = nameless_file(directory, 0);
  if (!file) fail_with_errno("writing into", directory);
  struct statvfs space {};
  ::fstatvfs(file.get(), &space);
  const uint64_t most = std::min<uint64_t>(256 << 20, static_cast<uint64_t>(space.f_bavail) * space.f_frsize / 10);
  const uint64_t size = std::clamp(most / kPage * kPage, kPage, kPiece);
  const std::unique_ptr<void, void (*)(void*)> piece(std::aligned_alloc(kPage, size), std::free);
  std::memset(piece.get(), 0x5a, size);
  const std::span<const std::byte> bytes(static_cast<const std::byte*>(piece.get()), size);
  const auto begin = std::chrono::steady_clock::now();
  const auto seconds = [&] { return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count(); };
  uint64_t written = 0;
  do {
    write_at(file, bytes, written, directory);
    written += size;
  } while (written + size <= most && seconds() < 3);
  if (::fsync(file.get()) != 0) fail_with_errno("writing into", directory);
  return static_cast<double>(written) / seconds() / 1e9;
}

}  // namespace upcycle
