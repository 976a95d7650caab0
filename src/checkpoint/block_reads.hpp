#pragma once
#include <condition_variable>
#include <mutex>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "base/tensor.hpp"
#include "checkpoint/stored_file.hpp"

namespace upcycle {

/// Blocks of stored files, read and checked in a fixed order by several threads: the caller's, and one to four that work ahead of it, as
/// LibTorch's number allows, so that neither the disk nor a GPU waits for checksums. Those threads call neither MPI nor HDF5 nor LibTorch.
class BlockReads {
 public:
  struct Read {
    const StoredFile* file;
    const StoredFile::Entry* entry;
    int64_t block;
    std::span<std::byte> target;   ///< where its bytes go; empty: into memory that is lent
  };

  /// What the reads name must live as long as this. `for_gpu`: memory that is lent is page-locked, from which a GPU copies several times
  /// as fast.
  explicit BlockReads(std::vector<Read> reads, bool for_gpu = false);
  ~BlockReads();
  BlockReads(const BlockReads&) = delete;
  BlockReads& operator=(const BlockReads&) = delete;

  /// The bytes of the next read; where they are lent, until next() is called again. Throws DamagedCheckpoint for a block that is not what
  /// was written, UserError when the file can't be read.
  std::span<const std::byte> next();

 private:
  struct Slot {
    Tensor memory = {};             ///< of the largest block that is lent
    std::byte* lent = nullptr;      ///< there
    std::span<const std::byte> bytes = {};
    std::string complaint = {};
    std::exception_ptr error = {};
    bool done = false;
  };
  int64_t bytes_of(const Read& read) const;
  void work();
  bool may_begin() const;
  bool read_one(std::unique_lock<std::mutex>& lock);   ///< false when none may begin
  void read(size_t index) noexcept;
  void expect(size_t index) const noexcept;

  const std::vector<Read> reads_;
  std::vector<Slot> slots_;   // read i uses slot i modulo their number, which bounds the memory that is lent
  size_t begun_ = 0, taken_ = 0;
  bool ending_ = false;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<std::thread> threads_;
};

}  // namespace upcycle
