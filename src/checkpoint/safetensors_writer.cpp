#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "base/error.hpp"
#include "checkpoint/durable.hpp"
#include "checkpoint/safetensors.hpp"
#include "checkpoint/safetensors_layout.hpp"

namespace upcycle {

namespace fs = std::filesystem;

struct SafetensorsWriter::State {
  fs::path directory;
  std::vector<Item> items;
  std::vector<SafetensorsShard> shards;
  size_t next = 0;   ///< item that write() expects
  size_t shard = 0;  ///< the one being written
  FileDescriptor file;
  bool finished = false;

  fs::path partial(const SafetensorsShard& s) const { return directory / (s.name + ".partial"); }

  void open(size_t which) {
    shard = which;
    file = create_file(partial(shards[which]));
    write_at(file, std::as_bytes(std::span(shards[which].header)), 0, partial(shards[which]));
  }

  void close() {
    file.reset();
    make_durable(partial(shards[shard]));
  }
};

SafetensorsWriter::SafetensorsWriter(fs::path directory, std::vector<Item> items, uint64_t max_shard_bytes,
                                     std::map<std::string, std::string> metadata)
    : state_(std::make_unique<State>()) {
  state_->directory = std::move(directory);
  state_->items = std::move(items);
  state_->shards = safetensors_shards(state_->items, max_shard_bytes, metadata);
  state_->open(0);
}

void SafetensorsWriter::write(const Tensor& value) {
  State& s = *state_;
  if (s.next == s.items.size()) throw std::logic_error("more tensors than the list has");
  const Item& item = s.items[s.next];
  if (value.sizes() != at::IntArrayRef(item.shape)) {
    throw std::logic_error(text("tensor '", item.name, "' has shape ", describe(value.sizes().vec()),
                                ", the list says ", describe(item.shape)));
  }
  if (s.next == s.shards[s.shard].end) {
    s.close();
    s.open(s.shard + 1);
  }
  const SafetensorsShard& shard = s.shards[s.shard];
  const Tensor host = value.detach().to(at::TensorOptions(at::kCPU).dtype(item.dtype)).contiguous();
  const std::span bytes(static_cast<const std::byte*>(host.const_data_ptr()), bytes_of(item));
  write_at(s.file, bytes, shard.offsets[s.next - shard.begin], s.partial(shard));
  ++s.next;
}

void SafetensorsWriter::finish() {
  State& s = *state_;
  if (s.next != s.items.size())
    throw std::logic_error(text("only ", s.next, " of ", s.items.size(), " tensors were written"));
  s.close();
  for (const SafetensorsShard& shard : s.shards) rename_durably(s.partial(shard), s.directory / shard.name);
  if (s.shards.size() > 1) write_text_durably(s.directory / kSafetensorsIndex, safetensors_index(s.items, s.shards));
  s.finished = true;
}

SafetensorsWriter::~SafetensorsWriter() {
  if (state_->finished) return;
  std::error_code ignored;
  for (const SafetensorsShard& shard : state_->shards) std::filesystem::remove(state_->partial(shard), ignored);
}

}  // namespace upcycle
