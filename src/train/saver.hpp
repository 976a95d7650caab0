#pragma once
#include <atomic>
#include <filesystem>
#include <functional>
#include <memory>

#include "base/host_memory.hpp"
#include "checkpoint/writer.hpp"
#include "config/run_config.hpp"
#include "train/snapshot.hpp"

namespace upcycle {

/// Stores a run's checkpoints: at once, or, with checkpoint.asynchronous, behind its steps, on threads that call neither MPI nor HDF5.
/// Where host memory has room for a copy of what this rank writes, the step waits for that copy alone. Where it has not, blocks that are
/// this rank's alone are taken out of the weights and moments as they are written, and the next update of the weights waits for that.
/// Between the ranks nothing is said but in step(): all know from a step's own all-reduce who has written.
class Saver {
 public:
  /// **Collective.** `alive` is called while there is something to wait for; `available` says how much host memory is free. `device`:
  /// where weights and moments will be.
  Saver(std::filesystem::path checkpoints, const Mesh&, const CheckpointSection&, std::function<void()> alive,
        std::function<uint64_t()> available = available_host_memory, c10::Device device = c10::Device(c10::kCPU));
  /// Drops a save that is not finished, and removes what is there of it.
  ~Saver();

  /// **Collective.** When the first step has been launched: where checkpoints will be written behind the steps, and the host has room for
  /// copies, their memory is taken from now on, on a thread of its own. A save that comes before all of it is there waits for it.
  void take_memory(const Weights&, const Optimizer&);
  /// Some of it is still to come.
  bool takes_memory() const { return threads_.takes(); }
  /// Bytes of host memory that are held for what is to be written.
  uint64_t memory() const { return threads_.held(); }

  /// **Collective.** Stores a checkpoint, or begins to; one in flight is finished first. `removes`: and then removes those that
  /// [checkpoint] does not keep. Throws UserError on all ranks for what went wrong, with this save or the one before.
  void save(Weights&, Optimizer*, const TrainingState&, const RunRecord&, bool removes);

  /// Before weights or moments are changed: waits until what is in flight does not need them any more.
  void before_update() const;
  /// This rank has still something to write; or it never will.
  bool writes() const { return writer_ && !threads_.idle(); }
  bool failed() const { return threads_.failed(); }
  /// On rank 0: the newest step whose checkpoint is published, of this saver's; -1 before the first.
  int64_t published() const { return published_; }

  /// **Collective.** What all ranks said of writes() and failed() in the same step: publishes what all have written. Throws UserError
  /// on all ranks for a failure.
  void step(bool any_writes, bool any_failed);
  /// **Collective.** Waits for what is in flight, and publishes it. Throws like save().
  void finish();

 private:
  /// Whether a copy fits.
  struct Room {
    uint64_t need, free;
    bool copies() const { return need <= free; }
    std::string words() const;
  };
  Room room(const Weights&, const Optimizer*) const;
  void wait() const;
  void publish();

  std::filesystem::path checkpoints_;
  const Mesh& mesh_;
  CheckpointSection settings_;
  std::function<void()> alive_;
  std::function<uint64_t()> available_;
  int64_t ranks_here_ = 1;            ///< on this host
  std::string told_;                  ///< what the log has last said of how checkpoints are written
  std::atomic<int64_t> published_ = -1;
  WriterThreads threads_;
  std::unique_ptr<CheckpointWriter> writer_;   ///< of the save in flight
  Manifest manifest_;
  bool removes_ = false;
  std::shared_ptr<std::atomic<bool>> taken_;   ///< what is in flight needs the tensors no more
};

}  // namespace upcycle
