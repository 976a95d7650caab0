#pragma once
#include <filesystem>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/block_source.hpp"
#include "checkpoint/tensor_file.hpp"
#include "checkpoint/write_options.hpp"
#include "parallel/communicator.hpp"

namespace upcycle {

/// One kind of tensor on its way to the disk: one HDF5 file, or, where there are many bytes, several with an index. The writer's threads
/// share it until their tasks are done.
class FileWriter : public std::enable_shared_from_this<FileWriter> {
 public:
  /// **Collective.** Plans who writes what, makes the files, and opens them on all ranks. `pieces` as in CheckpointWriter::add.
  FileWriter(std::filesystem::path path, std::span<const Piece> pieces, const Communicator& world, const WriteOptions& options,
             WriterThreads& threads, bool continued);

  /// **Collective.** Hands the blocks of which several ranks have parts to the threads; returns before they are written.
  void write_travelling();
  /// The same of all other blocks that this rank writes. Waits for no other rank.
  void write_own();
  /// **Collective.** After both: hands the files' fsync to the threads.
  void end();

  /// **Collective.** After all ranks' threads have done their work: every block's checksum, on all ranks.
  void gather_checksums();

  /// By rank 0, after gather_checksums(): stores the checksums. Calls neither MPI nor HDF5.
  void store_checksums() const;

  /// What the manifest's `tensors` says of this file, after gather_checksums().
  nlohmann::json summary() const;
  /// The names of all files.
  std::vector<std::string> files() const;
  uint64_t bytes() const noexcept { return bytes_; }   ///< that this rank writes
  Transfer transfer() const noexcept { return transfer_; }

 private:
  /// One HDF5 file: a run of the plan's tensors, and where they lie.
  struct Part {
    std::filesystem::path path;
    size_t first, last;              ///< tensors of the plan
    size_t first_block, last_block;
    Extents extents = {};
    bool was_there = false;          ///< left by an interrupted writer
    std::optional<BlockFile> file = {};
    std::optional<TensorFile> hyperslabs = {};   ///< instead, with Transfer::independent
  };

  std::vector<Part> split() const;
  void open(Part&, bool continued);
  bool is_there(const Part&, size_t index);
  void take_later(const Part&, size_t index);
  void write_block(const Part&, size_t index, std::span<std::byte> bytes);
  const Part& part_of(size_t index) const;
  uint64_t place(const Part&, size_t index) const;
  uint64_t place_of_checksum(const Part& part, size_t index) const { return part.extents.checksums + 8 * (index - part.first_block); }
  int64_t size(size_t index) const { return BlockSource::bytes(plan_, plan_.blocks[index]); }
  void report(size_t index);

  std::filesystem::path path_;
  const Communicator& world_;
  WriteOptions options_;
  WriterThreads& threads_;
  WritePlan plan_;
  std::optional<BlockSource> source_;
  std::vector<Part> parts_;
  std::vector<uint64_t> checksums_;   ///< of every block; this rank's are filled
  Transfer transfer_ = Transfer::automatic;
  uint64_t bytes_ = 0, taken_ = 0;
  uint64_t found_ = 0;   ///< bytes that an interrupted writer has left
};

}  // namespace upcycle
