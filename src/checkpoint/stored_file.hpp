#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/durable.hpp"
#include "checkpoint/tensor_file.hpp"

namespace upcycle {

/// One HDF5 file of tensors, for reading: HDF5 says where they lie, their bytes are read from there.
class StoredFile {
 public:
  struct Entry {
    TensorSpec spec;
    uint64_t offset;         ///< of the first byte
    size_t first_checksum;   ///< index of its first block's
  };

  /// Throws UserError when HDF5 can't open it, it holds foreign types, or its checksums are not as many as its blocks.
  explicit StoredFile(const std::filesystem::path& path);

  const std::filesystem::path& path() const noexcept { return path_; }
  const std::map<std::string, Entry>& entries() const noexcept { return entries_; }
  bool has_checksums() const noexcept { return !checksums_.empty(); }
  uint64_t checksum_of(const Entry& entry, int64_t block) const { return checksums_[entry.first_checksum + static_cast<size_t>(block)]; }

  /// Fills `memory` with the block's bytes and returns what is wrong with them, "" for nothing. `sum`: their checksum.
  std::string read(const Entry&, int64_t block, std::span<std::byte> memory, uint64_t& sum) const;
  /// Tells the system that these blocks will be read soon.
  void expect(const Entry&, int64_t first_block, int64_t last_block) const noexcept;

 private:
  std::filesystem::path path_;
  FileDescriptor file_;
  std::map<std::string, Entry> entries_;
  std::vector<uint64_t> checksums_;
};

}  // namespace upcycle
