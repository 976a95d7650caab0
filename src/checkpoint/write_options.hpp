#pragma once
#include <cstdint>
#include <functional>
#include <string>

#include "checkpoint/block_file.hpp"
#include "checkpoint/writer_threads.hpp"

namespace upcycle {

struct WriteOptions {
  Transfer transfer = Transfer::automatic;
  /// A file of tensors with more bytes than this becomes several, by the order of the tensors' names, and an index through which they
  /// look like one.
  uint64_t file_bytes = 64'000'000'000;
  /// What is written, in words: an interrupted writer's <folder>.partial of the same words is continued, its blocks whose checksums
  /// hold are not asked for again, and an interruption leaves one. Empty: what is left of a killed writer is removed.
  std::string continues;
  /// Bytes of this rank that are taken, and all of the file's; on the calling thread, after each block.
  std::function<void(uint64_t done, uint64_t total)> progress;
  /// Writes behind the caller's back, see add() and commit(); outlives the writer. Null: threads of the writer's own.
  WriterThreads* threads = nullptr;
  /// The caller has nothing to do but wait for the writer: so it computes the checksums meanwhile, which otherwise are the threads'.
  bool waits = false;
  /// With `threads`: blocks that no other rank has a part of are taken out of the pieces by them, and not by add().
  bool take_later = false;
};

}  // namespace upcycle
