#pragma once
#include <cstdint>
#include <filesystem>
#include <span>

#include "checkpoint/durable.hpp"

namespace upcycle {

/// How the bytes of a checkpoint reach its HDF5 files: [checkpoint] transfer.
enum class Transfer {
  automatic,     ///< direct where the file system can, else buffered
  direct,        ///< pwrite with O_DIRECT into the datasets' extents: no page cache between
  buffered,      ///< pwrite through the page cache into the datasets' extents
  independent,   ///< H5Dwrite of hyperslabs through MPI-IO, each rank by itself; never asynchronous
};
const char* name(Transfer) noexcept;

/// An existing file that this process writes by descriptors. Calls neither MPI nor HDF5.
class BlockFile {
 public:
  /// `transfer` is automatic, direct or buffered. Throws UserError naming the file when it can't be opened, or, for direct, when its
  /// file system has no O_DIRECT (with what to choose instead).
  BlockFile(std::filesystem::path path, Transfer transfer);

  /// What is used: direct or buffered.
  Transfer transfer() const noexcept { return direct_ ? Transfer::direct : Transfer::buffered; }
  const std::filesystem::path& path() const noexcept { return path_; }

  /// All of `bytes` at `offset`. Direct for whole pages of the file when memory begins where a page does too, buffered for the rest.
  /// Throws UserError naming the file.
  void write(std::span<const std::byte> bytes, uint64_t offset) const;
  /// Fills `bytes` from `offset`, as far as the file goes; returns how many. Through the page cache.
  size_t read(std::span<std::byte> bytes, uint64_t offset) const;

 private:
  std::filesystem::path path_;
  FileDescriptor buffered_, direct_;
};

}  // namespace upcycle
