#pragma once
#include <filesystem>
#include <memory>
#include <span>

#include "checkpoint/manifest.hpp"
#include "checkpoint/piece.hpp"
#include "checkpoint/write_options.hpp"
#include "parallel/communicator.hpp"

namespace upcycle {

// What lies in a checkpoint (checkpoints-schema/README.md has all of it). One file per kind of tensor; every file holds
// the same names, those of the model's parameters ("model.layers.0.mlp.experts.up_proj.weight"), so a piece's name is
// never decorated:
//   weights.h5      what the model computes with: bfloat16 or float32; routers always float32. Always there.
//   masters.h5      float32 masters, only of those parameters whose stored weight is not exactly the master. Absent when there are none.
//   exp_avg.h5      float32, Adam's first moments, of every parameter. Absent at step 0 and after convert.
//   exp_avg_sq.h5   float32, Adam's second moments, likewise.
// Beside them manifest.json, and small text files (certificate.json, config.json, tokenizer files) through add_text.

/// Writes one checkpoint: parallel HDF5, one contiguous dataset per global tensor, every rank whole blocks of rows (WritePlan), with a
/// checksum for each. Whole or absent: all goes to <folder>.partial; commit() fsyncs files and directories and renames. A writer
/// destroyed before commit(), or an error, before or after it, removes the partial folder (best effort), unless options.continues.
class CheckpointWriter {
 public:
  /// **Collective.** Throws UserError when `folder` is a valid checkpoint already or its parent can't be written.
  /// A damaged checkpoint in the way is renamed to <folder>.damaged-1 with a warning. `world` must outlive the writer.
  CheckpointWriter(std::filesystem::path folder, const Communicator& world, WriteOptions options = {});
  CheckpointWriter(std::filesystem::path folder, Communicator&& world, WriteOptions options = {}) = delete;
  ~CheckpointWriter();
  CheckpointWriter(const CheckpointWriter&) = delete;
  CheckpointWriter& operator=(const CheckpointWriter&) = delete;

  struct File {
    std::string name;
    std::span<const Piece> pieces;
  };
  /// **Collective.** One file of the checkpoint, e.g. "weights.h5". `pieces`: this rank's, of any number of tensors;
  /// all ranks' together must cover every tensor, each element once or by equal boxes of several ranks (replicas). Dtypes of one tensor
  /// agree. Throws UserError with the file when the disk is full, on all ranks; with threads given, perhaps only later.
  void add(const std::string& file, std::span<const Piece> pieces) {
    const File one{file, pieces};
    add({&one, 1});
  }
  /// **Collective.** The same of several: ranks wait for one another at the beginning and the end, not between two files.
  void add(std::span<const File> files);

  /// **Collective.** Further small files (certificate.json, tokenizer files, config.json); rank 0's content is written.
  void add_text(const std::string& file, const std::string& content);

  /// **Collective.** Waits for all ranks' bytes, completes `manifest` (files, tensors, checksums), writes it, makes all durable, renames;
  /// with threads given, one of rank 0's does what comes after the waiting, and WriterThreads::finish says how it went.
  void commit(Manifest manifest);

  /// Bytes that this rank writes, of all files added so far.
  uint64_t bytes() const noexcept;
  /// How the bytes go: direct, buffered or independent.
  Transfer transfer() const noexcept;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace upcycle
