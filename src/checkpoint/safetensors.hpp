#pragma once
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "base/box.hpp"
#include "base/mapped_file.hpp"
#include "base/tensor.hpp"

namespace upcycle {

/// Where a tensor lies: file (index into the directory's files), dtype, shape, absolute byte offsets.
struct SafetensorsEntry {
  size_t file = 0;
  at::ScalarType dtype = at::kFloat;
  Shape shape;
  uint64_t begin = 0;
  uint64_t end = 0;
};

/// Tensors of a Hugging Face directory (model.safetensors, else, as transformers chooses, model.safetensors.index.json
/// with its shards), memory-mapped: only the pages of what is read are touched.
class SafetensorsReader {
 public:
  /// Opens one .safetensors file, or a directory of them. Throws UserError naming file and tensor when a shard is
  /// missing or truncated, or when a header lies: not JSON, too long, offsets that overlap, leave holes, are negative,
  /// past the end or not shape x dtype, an unknown dtype, an index that disagrees with the shards.
  explicit SafetensorsReader(const std::filesystem::path& path);

  const std::map<std::string, SafetensorsEntry>& entries() const noexcept { return entries_; }
  const std::vector<std::filesystem::path>& files() const noexcept { return paths_; }
  bool contains(const std::string& name) const { return entries_.contains(name); }

  /// A copy of `box` of tensor `name`, CPU, contiguous, in the stored dtype. Reads only the bytes of the box.
  /// Throws UserError for a name that is not there, std::logic_error for a box outside the tensor.
  Tensor read(const std::string& name, const Box& box) const;
  Tensor read(const std::string& name) const;

 private:
  std::vector<std::filesystem::path> paths_;
  std::vector<MappedFile> maps_;
  std::map<std::string, SafetensorsEntry> entries_;
};

/// A tensor that is to be written.
struct SafetensorsItem {
  std::string name;
  at::ScalarType dtype;
  Shape shape;
};

/// Writes tensors, one after another, as sharded safetensors with an index (a single model.safetensors when one shard
/// is enough). Header and sizes are known first, so bytes go straight to their place and memory holds one tensor at a
/// time. Files are written as <name>.partial, fsynced and renamed by finish(); the destructor removes what was not
/// finished. For one rank; several write together with SharedSafetensors.
class SafetensorsWriter {
 public:
  using Item = SafetensorsItem;
  /// Makes `directory`. A shard holds at least one tensor and, beyond that, at most `max_shard_bytes`. Throws UserError
  /// naming the file when it can't be written (also write() and finish()), std::logic_error for two items of one name.
  SafetensorsWriter(std::filesystem::path directory, std::vector<Item> items, uint64_t max_shard_bytes,
                    std::map<std::string, std::string> metadata);
  /// The next item of the list, any device; cast to the item's dtype. Items come in the order of the list.
  void write(const Tensor& value);
  /// Closes and renames everything and writes the index. Throws std::logic_error when items are missing.
  void finish();
  ~SafetensorsWriter();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace upcycle
