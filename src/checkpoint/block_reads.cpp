#include "checkpoint/block_reads.hpp"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <exception>

#include "checkpoint/damaged.hpp"
#include "device/device.hpp"

namespace upcycle {

BlockReads::BlockReads(std::vector<Read> reads, bool for_gpu) : reads_(std::move(reads)) {
  const size_t threads = static_cast<size_t>(std::clamp(at::get_num_threads() - 1, 1, 4));
  slots_ = std::vector<Slot>(2 + 2 * threads);
  int64_t largest = 0;
  for (const Read& read : reads_) largest = std::max(largest, read.target.empty() ? bytes_of(read) : 0);
  for (Slot& slot : slots_) {
    if (largest == 0) break;
    slot.memory = for_gpu ? device::host_buffer(largest) : at::empty({largest}, at::kByte);
    slot.lent = static_cast<std::byte*>(slot.memory.mutable_data_ptr());
  }
  for (size_t index = 0; index < slots_.size(); ++index) expect(index);
  for (size_t i = 0; i < threads && i + 1 < reads_.size(); ++i) threads_.emplace_back([this] { work(); });
}

BlockReads::~BlockReads() {
  {
    const std::lock_guard lock(mutex_);
    ending_ = true;
  }
  changed_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

std::span<const std::byte> BlockReads::next() {
  std::unique_lock lock(mutex_);
  const size_t index = taken_++;   // from here on the slot of the read before is free
  changed_.notify_all();
  Slot& slot = slots_[index % slots_.size()];
  while (!slot.done) {
    if (!read_one(lock)) changed_.wait(lock, [&] { return slot.done; });
  }
  slot.done = false;
  if (slot.error) std::rethrow_exception(slot.error);
  if (!slot.complaint.empty()) throw DamagedCheckpoint(slot.complaint);
  return slot.bytes;
}

int64_t BlockReads::bytes_of(const Read& read) const {
  return read.entry->spec.blocks().run(read.block).size() * read.entry->spec.width();
}

void BlockReads::work() {
  std::unique_lock lock(mutex_);
  while (!ending_ && begun_ < reads_.size()) {
    if (!read_one(lock)) changed_.wait(lock, [&] { return ending_ || begun_ == reads_.size() || may_begin(); });
  }
}

// Not into the slot of what the caller was given last, read taken_ - 1.
bool BlockReads::may_begin() const { return begun_ < reads_.size() && begun_ + 1 < std::max<size_t>(taken_, 1) + slots_.size(); }

bool BlockReads::read_one(std::unique_lock<std::mutex>& lock) {
  if (!may_begin()) return false;
  const size_t index = begun_++;
  lock.unlock();
  read(index);
  lock.lock();
  slots_[index % slots_.size()].done = true;
  changed_.notify_all();
  return true;
}

// Nobody else touches the slot until it is done.
void BlockReads::read(size_t index) noexcept {
  Slot& slot = slots_[index % slots_.size()];
  const Read& wanted = reads_[index];
  slot.error = nullptr;
  slot.complaint.clear();
  expect(index + slots_.size());
  try {
    std::span<std::byte> bytes = wanted.target;
    if (bytes.empty()) {
      bytes = std::span(slot.lent, static_cast<size_t>(bytes_of(wanted)));
    }
    uint64_t sum = 0;
    slot.complaint = wanted.file->read(*wanted.entry, wanted.block, bytes, sum);
    slot.bytes = bytes;
  } catch (...) {
    slot.error = std::current_exception();
  }
}

void BlockReads::expect(size_t index) const noexcept {
  if (index < reads_.size()) reads_[index].file->expect(*reads_[index].entry, reads_[index].block, reads_[index].block + 1);
}

}  // namespace upcycle
