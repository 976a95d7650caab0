#include "train/saver.hpp"

#include <algorithm>
#include <chrono>
#include <thread>

#include "base/error.hpp"
#include "base/log.hpp"
#include "base/process.hpp"
#include "base/quantities.hpp"
#include "device/device.hpp"

namespace upcycle {
namespace {

constexpr uint64_t kRing = uint64_t{32} << 20;      // of a save that makes no copy: what a core's cache holds is copied, summed and written faster
constexpr uint64_t kSlack = uint64_t{256} << 20;    // of a copy: small tensors take more room than they have bytes
constexpr uint64_t kReserve = uint64_t{256} << 20;  // that a copy leaves free
constexpr uint64_t kPiece = uint64_t{128} << 20;    // in which a large copy's memory is taken: whoever leaves meanwhile waits for one

// What this rank has to write, about: its part of what is divided, and its share of what several ranks hold alike.
uint64_t state_bytes(const Weights& weights, const Optimizer* optimizer) {
  uint64_t bytes = 0;
  for (const Bucket& bucket : weights.buckets()) {
    const auto holders = static_cast<uint64_t>(bucket.place.holders);
    const uint64_t width = (bucket.dtype != at::kFloat ? 4 : 0) + (optimizer ? 8 : 0);
    bytes += bucket.values.nbytes() / holders + static_cast<uint64_t>(bucket.own.size()) * width / (bucket.divided() ? 1 : holders);
  }
  return bytes;
}

void make_room(WriterThreads& threads, uint64_t copy) {
  threads.set_room(copy + kSlack, static_cast<int64_t>(std::clamp(copy / 16, static_cast<uint64_t>(Blocks::kBytes), kPiece)));
}

}  // namespace

Saver::Saver(std::filesystem::path checkpoints, const Mesh& mesh, const CheckpointSection& settings, std::function<void()> alive,
             std::function<uint64_t()> available, c10::Device device)
    : checkpoints_(std::move(checkpoints)),
      mesh_(mesh),
      settings_(settings),
      alive_(std::move(alive)),
      available_(std::move(available)),
      threads_(kRing, device) {
  if (!settings_.asynchronous) return;
  const std::vector<std::string> hosts = mesh.world().all_gather(host_name());
  ranks_here_ = std::count(hosts.begin(), hosts.end(), host_name());
}

Saver::~Saver() = default;

// What an earlier copy has taken is there for the next one.
Saver::Room Saver::room(const Weights& weights, const Optimizer* optimizer) const {
  const uint64_t available = available_();
  return {state_bytes(weights, optimizer), threads_.held() + (available - std::min(available, kReserve)) / static_cast<uint64_t>(ranks_here_)};
}

std::string Saver::Room::words() const {
  if (copies()) return text("from a copy of about ", gigabytes(need, 2), " (", gigabytes(free, 2), " of host memory are free for it)");
  return text("streamed: a copy of about ", gigabytes(need, 2), " does not fit into the ", gigabytes(free, 2),
              " of host memory that are free for it, so the next update of the weights waits");
}

void Saver::take_memory(const Weights& weights, const Optimizer& optimizer) {
  if (!settings_.asynchronous || settings_.every == 0) return;   // or not known to be needed
  const Room found = room(weights, &optimizer);
  mesh_.world().barrier();   // all ranks of a host have looked before any takes
  log::info("checkpoints will be written behind the steps, " + found.words());
  if (!found.copies()) return;
  make_room(threads_, found.need);
  threads_.take_ahead(found.need);
}

void Saver::save(Weights& weights, Optimizer* optimizer, const TrainingState& state, const RunRecord& record, bool removes) {
  finish();
  const bool behind = settings_.asynchronous && optimizer;   // before training there is nothing to be behind of
  WriteOptions options = write_options(settings_);
  options.progress = [this](uint64_t, uint64_t) { alive_(); };
  options.threads = &threads_;
  const Room found = room(weights, optimizer);
  if (behind && found.copies()) {
    make_room(threads_, found.need);
  } else {
    threads_.set_room(kRing);
  }
  options.waits = !behind;
  options.take_later = behind && !found.copies();
  removes_ = removes;
  taken_ = std::make_shared<std::atomic<bool>>(!options.take_later);   // or it is, when save() returns
  writer_ = std::make_unique<CheckpointWriter>(checkpoints_ / step_directory(state.step), mesh_.world(), options);
  manifest_ = add_snapshot(*writer_, mesh_, weights, optimizer, state, record);
  if (options.take_later) threads_.push([taken = taken_] { *taken = true; });
  const std::string how = behind ? found.copies() ? "from a copy" : "streamed" : "at once";
  if (std::exchange(told_, how) != how) {
    log::info(text("checkpoints are written ", name(writer_->transfer()), behind ? ", behind the steps, " + found.words() : ""));
  }
  if (!behind) finish();
}

void Saver::wait() const {
  while (!threads_.idle()) {
    alive_();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

void Saver::before_update() const {
  while (writer_ && !*taken_ && !threads_.idle()) {
    alive_();
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
}

void Saver::step(bool any_writes, bool any_failed) {
  if (any_failed) return finish();
  if (writer_ && !any_writes) publish();
}

// All ranks' bytes are on the disk: the rest is rank 0's, on one of its threads.
void Saver::publish() {
  const std::filesystem::path folder = checkpoints_ / step_directory(manifest_.step);
  writer_->commit(manifest_);
  writer_.reset();
  if (mesh_.world().rank() != 0) return;
  threads_.push([this, step = manifest_.step, folder, checkpoints = checkpoints_, settings = settings_, removes = removes_] {
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
  mesh_.world().together([&] { threads_.finish(); });
}

}  // namespace upcycle
