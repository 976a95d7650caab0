#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "checkpoint/safetensors.hpp"

namespace upcycle {

uint64_t bytes_of(const SafetensorsItem&);

/// One safetensors file: the items [begin, end) of a list, where their bytes go, and the header in front.
struct SafetensorsShard {
  size_t begin = 0;
  size_t end = 0;
  std::string name;
  std::string header;             ///< length and JSON, ready to be written
  std::vector<uint64_t> offsets;  ///< of each item, from the file's start
  uint64_t bytes = 0;             ///< of tensors; the file has header.size() more
};

/// Shards in the list's order; one is closed before the item that would make it larger than `max_bytes`. In a shard, wide dtypes come
/// first, so that every tensor is aligned to its elements (readers map the file). Pure: the same on all ranks.
/// Throws std::logic_error for two items of one name, UserError for a header that no reader takes.
std::vector<SafetensorsShard> safetensors_shards(const std::vector<SafetensorsItem>& items, uint64_t max_bytes,
                                                 const std::map<std::string, std::string>& metadata);

/// Cuts a row-major array of shape `size` into boxes of at most `max_elements` elements (at least one), in order, each one run of
/// elements: all of them laid end to end are the array. None of an array without elements.
std::vector<Box> row_blocks(const Shape& size, int64_t max_elements);

/// The content of model.safetensors.index.json.
std::string safetensors_index(const std::vector<SafetensorsItem>& items, const std::vector<SafetensorsShard>& shards);
inline constexpr const char* kSafetensorsIndex = "model.safetensors.index.json";

}  // namespace upcycle
