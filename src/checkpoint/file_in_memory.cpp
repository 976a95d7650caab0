#include "checkpoint/file_in_memory.hpp"

#include <algorithm>
#include <vector>

#include "checkpoint/durable.hpp"

namespace upcycle {
namespace {

constexpr size_t kRun = size_t{1} << 20;   // bytes that are written at a time

/// Calls action(offset of a page, begin in it, where it is in the bytes, how many) for each page that `size` bytes from `offset` on touch,
/// until one says false.
template <class Action>
bool for_pages(uint64_t offset, size_t size, Action&& action) {
  for (size_t done = 0; done < size;) {
    const size_t begin = (offset + done) % FileInMemory::kPage, count = std::min(FileInMemory::kPage - begin, size - done);
    if (!action(offset + done - begin, begin, done, count)) return false;
    done += count;
  }
  return true;
}

}  // namespace

bool FileInMemory::write(std::span<const std::byte> bytes, uint64_t offset) {
  size_ = std::max(size_, offset + bytes.size());
  return for_pages(offset, bytes.size(), [&](uint64_t page, size_t begin, size_t at, size_t count) {
    const auto [found, added] = pages_.try_emplace(page);
    if (added && load_ && !load_(page, found->second)) {
      pages_.erase(found);
      return false;
    }
    std::copy_n(bytes.data() + at, count, found->second.data() + begin);
    return true;
  });
}

bool FileInMemory::read(std::span<std::byte> bytes, uint64_t offset) const {
  return for_pages(offset, bytes.size(), [&](uint64_t page, size_t begin, size_t at, size_t count) {
    Page loaded{};
    const auto found = pages_.find(page);
    if (found == pages_.end() && load_ && !load_(page, loaded)) return false;
    std::copy_n((found == pages_.end() ? loaded : found->second).data() + begin, count, bytes.data() + at);
    return true;
  });
}

void FileInMemory::resize(uint64_t size) {
  size_ = size;
  pages_.erase(pages_.lower_bound(size), pages_.end());
  const auto last = pages_.find(size - size % kPage);
  if (last != pages_.end()) std::fill(last->second.begin() + static_cast<ptrdiff_t>(size % kPage), last->second.end(), std::byte{0});
}

void FileInMemory::store(const std::filesystem::path& path) const {
  const FileDescriptor file = create_file(path);
  reserve(file, size_, path);
  std::vector<std::byte> run;
  uint64_t begin = 0;
  const auto put = [&] {
    write_at(file, std::span(run).first(std::min(run.size(), size_ - begin)), begin, path);
    run.clear();
  };
  for (const auto& [offset, page] : pages_) {
    if (!run.empty() && (offset != begin + run.size() || run.size() >= kRun)) put();
    if (run.empty()) begin = offset;
    run.insert(run.end(), page.begin(), page.end());
  }
  if (!run.empty()) put();
  make_durable(path);
}

}  // namespace upcycle
