#pragma once
#include <cstdint>
#include <filesystem>
#include <span>

namespace upcycle {

/// A file mapped read-only into memory; pages come as they are touched. Move-only; unmapped by the destructor.
class MappedFile {
 public:
  /// Throws UserError naming the file when it can't be opened or mapped. An empty file is an empty span.
  explicit MappedFile(const std::filesystem::path& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const std::byte> bytes() const noexcept { return {data_, size_}; }
  const std::filesystem::path& path() const noexcept { return path_; }

  /// Tells the kernel that `bytes` from `offset` on are read next: it may fetch them meanwhile. Never fails.
  void expect(size_t offset, size_t bytes) const noexcept;
  /// Takes the file's pages out of this process (they stay in the page cache, and come back when touched): what was read no longer
  /// counts as its memory.
  void forget() const noexcept;

 private:
  std::filesystem::path path_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace upcycle
