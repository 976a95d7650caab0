#include "base/mapped_file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>
#include <utility>

#include "base/error.hpp"
#include "base/handle.hpp"

namespace upcycle {
namespace {

using FileDescriptor = Handle<int, [](int fd) { close(fd); }, [] { return -1; }>;

std::string reason() { return std::generic_category().message(errno); }

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) : path_(path) {
  const FileDescriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file) fail(path.string(), ": cannot be opened: ", reason());
  struct stat status = {};
  if (fstat(file.get(), &status) != 0) fail(path.string(), ": cannot be examined: ", reason());
  if (!S_ISREG(status.st_mode)) fail(path.string(), ": is not a regular file");
  if (status.st_size == 0) return;  // mmap refuses a length of zero
  void* const address = mmap(nullptr, static_cast<size_t>(status.st_size), PROT_READ, MAP_SHARED, file.get(), 0);
  if (address == MAP_FAILED) fail(path.string(), ": cannot be mapped into memory: ", reason());
  data_ = static_cast<const std::byte*>(address);
  size_ = static_cast<size_t>(status.st_size);
}

MappedFile::MappedFile(MappedFile&& other) noexcept
    : path_(std::move(other.path_)), data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  std::swap(path_, other.path_);
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

void MappedFile::expect(size_t offset, size_t bytes) const noexcept {
  static const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (offset >= size_) return;
  const size_t begin = offset / page * page, end = std::min(size_, offset + bytes);
  madvise(const_cast<std::byte*>(data_) + begin, end - begin, MADV_WILLNEED);
}

void MappedFile::forget() const noexcept {
  if (data_ != nullptr) madvise(const_cast<std::byte*>(data_), size_, MADV_DONTNEED);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(const_cast<std::byte*>(data_), size_);
}

}  // namespace upcycle
