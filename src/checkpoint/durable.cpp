#include "checkpoint/durable.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "base/error.hpp"
#include "base/quantities.hpp"

namespace upcycle {
namespace fs = std::filesystem;

void close_descriptor(int descriptor) noexcept { ::close(descriptor); }

void fail_with_errno(const std::string& doing, const fs::path& path) {
  const int code = errno;
  const char* advice = "";
  if (code == ENOSPC || code == EDQUOT) advice = " (free some space, or choose another directory)";
  if (code == EACCES || code == EPERM || code == EROFS) advice = " (choose a directory that you may write)";
  if (code == EIO) advice = " (the disk fails, or the way to it: the system's log may say why; choose another directory)";
  if (code == EFBIG) advice = " (the limit on file sizes of this process or file system: see ulimit -f)";
  fail(doing, " ", path.string(), ": ", std::strerror(code), advice);
}

FileDescriptor create_file(const fs::path& path) {
  std::error_code ignored;  // open() gives the better message
  if (path.has_parent_path()) fs::create_directories(path.parent_path(), ignored);
  FileDescriptor file(::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  if (!file) fail_with_errno("creating", path);
  return file;
}

void reserve(const FileDescriptor& file, uint64_t bytes, const fs::path& path) {
  const auto size = static_cast<off_t>(bytes);
  const std::string doing = text("reserving ", bytes, " bytes for");
  if (::ftruncate(file.get(), size) != 0) fail_with_errno(doing, path);
  // Not every file system can reserve.
  if (size > 0 && ::fallocate(file.get(), 0, 0, size) != 0 && (errno == ENOSPC || errno == EDQUOT || errno == EFBIG)) fail_with_errno(doing, path);
}

void write_at(const FileDescriptor& file, std::span<const std::byte> bytes, uint64_t offset, const fs::path& path) {
  while (!bytes.empty()) {
    const ssize_t written = ::pwrite(file.get(), bytes.data(), bytes.size(), static_cast<off_t>(offset));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) fail_with_errno("writing", path);
    bytes = bytes.subspan(static_cast<size_t>(written));
    offset += static_cast<uint64_t>(written);
  }
}

size_t read_at(const FileDescriptor& file, std::span<std::byte> bytes, uint64_t offset, const fs::path& path) {
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t got = ::pread(file.get(), bytes.data() + done, bytes.size() - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) fail_with_errno("reading", path);
    if (got == 0) break;
    done += static_cast<size_t>(got);
  }
  return done;
}

void make_durable(const fs::path& path) {
  const FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file) fail_with_errno("opening", path);
  // Some file systems refuse fsync on directories; they have no later moment to offer either.
  if (::fsync(file.get()) != 0 && errno != EINVAL) fail_with_errno("storing", path);
}

void make_directories(const fs::path& path) {
  if (path.empty() || fs::is_directory(path)) return;
  const fs::path parent = path.has_filename() ? path.parent_path() : path.parent_path().parent_path();
  make_directories(parent);
  if (::mkdir(path.c_str(), 0777) != 0 && !(errno == EEXIST && fs::is_directory(path))) {
    if (errno == EEXIST) errno = fs::exists(path) ? ENOTDIR : ENOENT;   // a file, or a link to nothing
    fail_with_errno("creating", path);
  }
  make_durable(parent.empty() ? fs::path(".") : parent);
}

void rename_durably(const fs::path& from, const fs::path& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) fail_with_errno("renaming " + from.string() + " to", to);
  make_durable(to.has_parent_path() ? to.parent_path() : fs::path("."));
}

void write_text_durably(const fs::path& path, const std::string& content) {
  fs::path partial = path;
  partial += ".partial";
  try {
    write_at(create_file(partial), std::as_bytes(std::span(content)), 0, partial);
    make_durable(partial);
    rename_durably(partial, path);
  } catch (...) {
    std::error_code ignored;
    fs::remove(partial, ignored);
    throw;
  }
}

fs::path existing_part(const fs::path& path) {
  fs::path place = fs::absolute(path);
  while (!fs::exists(place) && place.has_relative_path()) place = place.parent_path();
  return place;
}

void check_free_space(const fs::path& path, uint64_t bytes_needed, const std::string& what) {
  const fs::path place = existing_part(path);
  struct statvfs space {};
  if (::statvfs(place.c_str(), &space) != 0) fail_with_errno("asking for the free space of", place);
  const uint64_t free = static_cast<uint64_t>(space.f_bavail) * space.f_frsize;
  if (free < bytes_needed) {
    fail(what, " needs ", gigabytes(bytes_needed, 2), " but ", place.string(), " has ", gigabytes(free, 2),
         " free: free some space, or set run.directory to another disk");
  }
}

}  // namespace upcycle
