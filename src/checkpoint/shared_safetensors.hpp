#pragma once
#include <functional>
#include <memory>

#include "checkpoint/safetensors.hpp"
#include "parallel/communicator.hpp"

namespace upcycle {

/// Writes what SafetensorsWriter writes, byte for byte, from several ranks at once, and goes on where an interrupted attempt stopped.
/// The directory is the caller's workplace, who publishes it by a rename. Rank 0 lays the files out; then every rank writes blocks of
/// its own at their offsets, and notes in a small file beside them (.resume.<rank>) the XXH3 of each block that was written. What a
/// later attempt finds noted it reads again; where the bytes are as noted they stay. Memory: some 32 MiB of blocks, which a thread writes
/// (with O_DIRECT where the file system can) while the next ones are made.
class SharedSafetensors {
 public:
  /// Elements of one item that lie together: whole rows, or a part of one.
  struct Block {
    size_t item;
    Box box;      ///< of the item
    size_t number;  ///< of all blocks
  };
  static constexpr int64_t kBlockBytes = int64_t{4} << 20;
  /// Lowered by tests, so that small tensors have many blocks.
  static inline int64_t block_bytes = kBlockBytes;
  using Progress = std::function<void(uint64_t done, uint64_t total)>;

  /// **Collective.** Makes `directory`, or goes on in one that was left by an attempt with the same items, shards and `identity`;
  /// any other content of it is removed. `progress` is told of the bytes that are read again. Throws UserError naming what can't be
  /// written, std::logic_error for two items of one name. `world` must outlive the writer.
  SharedSafetensors(std::filesystem::path directory, std::vector<SafetensorsItem> items, uint64_t max_shard_bytes,
                    const std::map<std::string, std::string>& metadata, const Communicator& world, const std::string& identity,
                    const Progress& progress = {});
  ~SharedSafetensors();

  /// Bytes of all tensors; of those, what was there already, on all ranks.
  uint64_t bytes() const noexcept;
  uint64_t found() const noexcept;
  /// What this rank has to write, in the order of the files.
  const std::vector<Block>& missing() const noexcept;
  const SafetensorsItem& item(const Block&) const;

  /// `values`: of the block's size, any dtype, any device; cast to the item's dtype. In any order, each once. Throws UserError for what
  /// went wrong with an earlier block, too.
  void write(const Block&, const Tensor& values);

  /// **Collective.** All bytes on the disk, then the index; the notes are removed. Throws std::logic_error when blocks are missing.
  void finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace upcycle
