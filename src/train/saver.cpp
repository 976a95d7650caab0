#include "train/saver.hpp"

#include <algorithm>
#include <chrono>
#include <thread>

#include "base/error.hpp"
#include "base/gigabytes.hpp"
#include "base/log.hpp"
#include "base/process.hpp"
#include "device/device.hpp"

namespace upcycle {
namespace {

constexpr uint64_t kRing = uint64_t{32} << 20;      // of a save that makes no copy: what a core's cache holds is copied, summed and written faster
constexpr uint64_t kSlack = uint64_t{256} << 20;    // of a copy: small tensors take more room than they have bytes
constexpr uint64_t kReserve = uint64_t{256} << 20;  // that a copy leaves free

// The most that this rank may have to write: all that it holds, and of what is divided its part.
uint64_t state_bytes(const Weights& weights, const Optimizer* optimizer) {
  uint64_t bytes = 0;
  for (const Bucket& bucket : weights.buckets()) {
    bytes += bucket.values.nbytes();
    if (bucket.dtype != at::kFloat) bytes += static_cast<uint64_t>(bucket.own.size()) * 4;
    if (optimizer) bytes += static_cast<uint64_t>(bucket.own.size()) * 8;
  }
  return bytes;
}

}  // namespace

Saver::Saver(std::filesystem::path checkpoints, const Mesh& mesh, const CheckpointSection& settings, std::function<void()> alive,
             std::function<uint64_t()> available)
    : checkpoints_(std::move(checkpoints)), mesh_(mesh), settings_(settings), alive_(std::move(alive)), available_(std::move(available)), thread_(kRing) {
  if (!settings_.asynchronous) return;
  const std::vector<std::string> hosts = mesh.world().all_gather(host_name());
  ranks_here_ = std::count(hosts.begin(), hosts.end(), host_name());
}

Saver::~Saver() = default;

uint64_t Saver::share_of_memory() const {
  const uint64_t available = available_();
  return (available - std::min(available, kReserve)) / static_cast<uint64_t>(ranks_here_);
}

void Saver::save(Weights& weights, Optimizer* optimizer, const TrainingState& state, const RunRecord& record, bool removes) {
  finish();
  const bool behind = settings_.asynchronous && optimizer;   // before training there is nothing to be behind of
  WriteOptions options = write_options(settings_);
  options.progress = [this](uint64_t, uint64_t) { alive_(); };
  options.thread = &thread_;
  const uint64_t need = state_bytes(weights, optimizer), room = share_of_memory();
  const bool copies = need <= room;
  thread_.set_room(behind && copies ? need + kSlack : kRing);
  options.waits = !behind;
  options.take_later = behind && !copies;
  removes_ = removes;
  taken_ = std::make_shared<std::atomic<bool>>(false);
  writer_ = std::make_unique<CheckpointWriter>(checkpoints_ / step_directory(state.step), mesh_.world(), options);
  manifest_ = add_snapshot(*writer_, mesh_, weights, optimizer, state, record);
  thread_.push([taken = taken_] { *taken = true; });
  if (!std::exchange(told_, true)) {
    const std::string how = !behind ? "" : copies ? text(", behind the steps, from a copy of at most ", gigabytes(need, 2), " (", gigabytes(room, 2), " of host memory are free for it)")
                                                  : text(", behind the steps, streamed: a copy of ", gigabytes(need, 2), " does not fit into the ", gigabytes(room, 2),
                                                         " of host memory that are free for it, so the next update of the weights waits");
    log::info(text("checkpoints are written ", name(writer_->transfer()), how));
  }
  if (!behind) finish();
}

void Saver::wait() const {
  while (!thread_.idle()) {
    alive_();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

void Saver::before_update() const {
  // The values of blocks that were copied are taken long since; of the others they are as the thread gets to them.
  while (writer_ && !*taken_ && !thread_.failed()) {
    alive_();
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

void Saver::step(bool any_writes, bool any_failed) {
  if (any_failed) return finish();
  if (writer_ && !any_writes) publish();
}

// All ranks' bytes are on the disk: the rest is rank 0's, on its thread.
void Saver::publish() {
  const std::filesystem::path folder = checkpoints_ / step_directory(manifest_.step);
  writer_->commit(manifest_);
  writer_.reset();
  if (mesh_.world().rank() != 0) return;
  thread_.push([this, step = manifest_.step, folder, checkpoints = checkpoints_, settings = settings_, removes = removes_] {
    published_ = step;
    log::info("saved " + folder.string());
    if (removes) remove_old(checkpoints, settings.keep, settings.keep_every, settings.keep_best);
  });
}

void Saver::finish() {
  wait();
  if (writer_) {
    try {
      publish();
    } catch (...) {
      writer_.reset();   // removes what is there of it
      throw;
    }
  }
  wait();
  mesh_.world().together([&] { thread_.finish(); });
}

}  // namespace upcycle
