#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <iomanip>
#include <numeric>
#include <set>

#include "base/error.hpp"
#include "checkpoint/durable.hpp"
#include "checkpoint/safetensors.hpp"
#include "checkpoint/safetensors_header.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;
using Item = SafetensorsWriter::Item;

uint64_t bytes_of(const Item& item) {
  return static_cast<uint64_t>(elements(item.shape)) * c10::elementSize(item.dtype);
}

/// One file: the items [begin, end) of the list, where their bytes go, and the header in front.
struct Shard {
  size_t begin = 0;
  size_t end = 0;
  std::string name;
  std::string header;             ///< length and JSON, ready to be written
  std::vector<uint64_t> offsets;  ///< of each item, from the file's start
  uint64_t bytes = 0;             ///< of tensors
};

/// Shards in the list's order; a shard is closed before the item that would make it larger than `max_bytes`.
std::vector<Shard> cut(const std::vector<Item>& items, uint64_t max_bytes) {
  std::vector<Shard> shards(1);
  for (size_t i = 0; i < items.size(); ++i) {
    const uint64_t bytes = bytes_of(items[i]);
    if (shards.back().bytes > 0 && shards.back().bytes + bytes > max_bytes) shards.emplace_back().begin = i;
    shards.back().bytes += bytes;
    shards.back().end = i + 1;
  }
  for (size_t i = 0; i < shards.size(); ++i) {
    shards[i].name = shards.size() == 1 ? "model.safetensors"
                                        : text("model-", std::setfill('0'), std::setw(5), i + 1, "-of-", std::setw(5),
                                               shards.size(), ".safetensors");
  }
  return shards;
}

/// Places wide dtypes first, so that every tensor is aligned to its elements (readers map the file), and writes the
/// header.
void lay_out(Shard& shard, const std::vector<Item>& items, const std::map<std::string, std::string>& metadata) {
  std::vector<size_t> order(shard.end - shard.begin);
  std::iota(order.begin(), order.end(), shard.begin);
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) {
    return c10::elementSize(items[a].dtype) > c10::elementSize(items[b].dtype);
  });
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  shard.offsets.resize(order.size());
  uint64_t position = 0;
  for (const size_t i : order) {
    const uint64_t end = position + bytes_of(items[i]);
    header[items[i].name] = {{"dtype", safetensors_dtype_name(items[i].dtype)},
                             {"shape", items[i].shape},
                             {"data_offsets", {position, end}}};
    shard.offsets[i - shard.begin] = position;
    position = end;
  }
  std::string json = header.dump();
  json.resize((json.size() + 7) / 8 * 8, ' ');
  const uint64_t length = json.size();
  if (length > kMaxSafetensorsHeader)
    fail("the header of ", shard.name, " would have ", length, " bytes: choose smaller shards");
  shard.header.assign(reinterpret_cast<const char*>(&length), sizeof length);
  shard.header += json;
  for (uint64_t& offset : shard.offsets) offset += shard.header.size();
}

}  // namespace

struct SafetensorsWriter::State {
  fs::path directory;
  std::vector<Item> items;
  std::vector<Shard> shards;
  size_t next = 0;   ///< item that write() expects
  size_t shard = 0;  ///< the one being written
  FileDescriptor file;
  bool finished = false;

  fs::path partial(const Shard& s) const { return directory / (s.name + ".partial"); }

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
  std::set<std::string> names{"__metadata__"};
  for (const Item& item : items) {
    if (!names.insert(item.name).second) throw std::logic_error(text("two tensors are called '", item.name, "'"));
  }
  state_->directory = std::move(directory);
  state_->items = std::move(items);
  state_->shards = cut(state_->items, max_shard_bytes);
  for (Shard& shard : state_->shards) lay_out(shard, state_->items, metadata);
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
  const Shard& shard = s.shards[s.shard];
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
  nlohmann::ordered_json weight_map = nlohmann::ordered_json::object();
  uint64_t total = 0;
  for (const Shard& shard : s.shards) {
    rename_durably(s.partial(shard), s.directory / shard.name);
    total += shard.bytes;
    for (size_t i = shard.begin; i < shard.end; ++i) weight_map[s.items[i].name] = shard.name;
  }
  if (s.shards.size() > 1) {
    const nlohmann::ordered_json index = {{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}};
    write_text_durably(s.directory / "model.safetensors.index.json", index.dump(2) + "\n");
  }
  s.finished = true;
}

SafetensorsWriter::~SafetensorsWriter() {
  if (state_->finished) return;
  std::error_code ignored;
  for (const Shard& shard : state_->shards) std::filesystem::remove(state_->partial(shard), ignored);
}

}  // namespace upcycle
