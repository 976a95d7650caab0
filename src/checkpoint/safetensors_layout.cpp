#include "checkpoint/safetensors_layout.hpp"

#include <algorithm>
#include <iomanip>
#include <numeric>
#include <set>

#include "base/error.hpp"
#include "checkpoint/safetensors_header.hpp"

namespace upcycle {
namespace {

using Item = SafetensorsItem;

std::vector<SafetensorsShard> cut(const std::vector<Item>& items, uint64_t max_bytes) {
  std::vector<SafetensorsShard> shards(1);
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

void lay_out(SafetensorsShard& shard, const std::vector<Item>& items, const std::map<std::string, std::string>& metadata) {
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

uint64_t bytes_of(const Item& item) { return static_cast<uint64_t>(elements(item.shape)) * c10::elementSize(item.dtype); }

std::vector<SafetensorsShard> safetensors_shards(const std::vector<Item>& items, uint64_t max_bytes,
                                                 const std::map<std::string, std::string>& metadata) {
  std::set<std::string> names{"__metadata__"};
  for (const Item& item : items) {
    if (!names.insert(item.name).second) throw std::logic_error(text("two tensors are called '", item.name, "'"));
  }
  std::vector<SafetensorsShard> shards = cut(items, max_bytes);
  for (SafetensorsShard& shard : shards) lay_out(shard, items, metadata);
  return shards;
}

std::vector<Box> row_blocks(const Shape& size, int64_t max_elements) {
  std::vector<Box> out;
  if (elements(size) == 0) return out;
  // The dims from `whole` on fit into one slab; the one before is cut into ranges, those in front are walked one by
  // one.
  size_t whole = size.size();
  int64_t inner = 1;
  while (whole > 0 && inner * size[whole - 1] <= max_elements) inner *= size[--whole];
  if (whole == 0) return {upcycle::whole(size)};
  const size_t cut = whole - 1;
  const int64_t step = std::max<int64_t>(1, max_elements / inner);

  Box box = upcycle::whole(size);
  for (size_t dim = 0; dim < cut; ++dim) box.size[dim] = 1;
  for (;;) {
    for (int64_t at = 0; at < size[cut]; at += step) {
      box.begin[cut] = at;
      box.size[cut] = std::min(step, size[cut] - at);
      out.push_back(box);
    }
    size_t dim = cut;
    while (dim > 0 && ++box.begin[dim - 1] == size[dim - 1]) box.begin[--dim] = 0;
    if (dim == 0) return out;
  }
}

std::string safetensors_index(const std::vector<Item>& items, const std::vector<SafetensorsShard>& shards) {
  nlohmann::ordered_json weight_map = nlohmann::ordered_json::object();
  uint64_t total = 0;
  for (const SafetensorsShard& shard : shards) {
    total += shard.bytes;
    for (size_t i = shard.begin; i < shard.end; ++i) weight_map[items[i].name] = shard.name;
  }
  return nlohmann::ordered_json{{"metadata", {{"total_size", total}}}, {"weight_map", weight_map}}.dump(2) + "\n";
}

}  // namespace upcycle
