#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <span>

namespace upcycle {

/// The pages of a file that somebody has written, in memory; the others cost nothing.
class FileInMemory {
 public:
  static constexpr size_t kPage = 4096;
  /// `load` fills a page of zeros with what it holds before anybody has written to it; false: it can't. Null: zeros.
  using Load = std::function<bool(uint64_t offset, std::span<std::byte, kPage>)>;
  explicit FileInMemory(Load load = nullptr) : load_(std::move(load)) {}

  /// False when a page can't be loaded.
  bool write(std::span<const std::byte> bytes, uint64_t offset);
  bool read(std::span<std::byte> bytes, uint64_t offset) const;
  /// Cuts the file to `size`, or makes it longer.
  void resize(uint64_t size);
  uint64_t size() const noexcept { return size_; }
  /// Makes the file `path` of it, fsynced; its disk space is reserved first, where the file system can. Throws UserError naming it.
  void store(const std::filesystem::path& path) const;

 private:
  using Page = std::array<std::byte, kPage>;
  Load load_;
  std::map<uint64_t, Page> pages_;   ///< by their offsets
  uint64_t size_ = 0;
};

}  // namespace upcycle
