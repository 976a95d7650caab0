#include "checkpoint/block_file.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

#include "base/error.hpp"
#include "checkpoint/blocks.hpp"

namespace upcycle {
namespace {

constexpr uint64_t kPage = Blocks::kAlignment;

}  // namespace

const char* name(Transfer transfer) noexcept {
  switch (transfer) {
    case Transfer::direct: return "direct";
    case Transfer::buffered: return "buffered";
    case Transfer::independent: return "independent";
    default: return "auto";
  }
}

BlockFile::BlockFile(std::filesystem::path path, Transfer transfer) : path_(std::move(path)) {
  buffered_ = FileDescriptor(::open(path_.c_str(), O_RDWR | O_CLOEXEC));
  if (!buffered_) fail_with_errno("opening", path_);
  if (transfer == Transfer::buffered) return;
  direct_ = FileDescriptor(::open(path_.c_str(), O_WRONLY | O_DIRECT | O_CLOEXEC));
  if (direct_ || transfer == Transfer::automatic) return;
  if (errno != EINVAL && errno != ENOTSUP) fail_with_errno("opening", path_);
  fail("checkpoint.transfer = \"direct\": the file system of ", path_.string(), " has no O_DIRECT; choose \"auto\" or \"buffered\"");
}

void BlockFile::write(std::span<const std::byte> bytes, uint64_t offset) const {
  const bool aligned = offset % kPage == 0 && reinterpret_cast<uintptr_t>(bytes.data()) % kPage == 0;
  const size_t whole_pages = direct_ && aligned ? bytes.size() - bytes.size() % kPage : 0;
  size_t done = 0;
  // What a short write leaves in the middle of a page is buffered; so is all where a file system opens with O_DIRECT but does not write so.
  while (done < whole_pages && done % kPage == 0) {
    const ssize_t written = ::pwrite(direct_.get(), bytes.data() + done, whole_pages - done, static_cast<off_t>(offset + done));
    if (written < 0 && errno == EINTR) continue;
    if (written < 0 && errno == EINVAL) break;
    if (written < 0) fail_with_errno("writing", path_);
    done += static_cast<size_t>(written);
  }
  if (done < bytes.size()) write_at(buffered_, bytes.subspan(done), offset + done, path_);
}

size_t BlockFile::read(std::span<std::byte> bytes, uint64_t offset) const { return read_at(buffered_, bytes, offset, path_); }

}  // namespace upcycle
