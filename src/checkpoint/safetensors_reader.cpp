#include <ATen/ops/empty.h>

#include <cstring>
#include <set>

#include "base/error.hpp"
#include "base/lines.hpp"
#include "checkpoint/safetensors.hpp"
#include "checkpoint/safetensors_header.hpp"
#include "checkpoint/safetensors_layout.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;
constexpr const char* kSingle = "model.safetensors";

/// tensor -> shard, as the index of a sharded checkpoint says.
std::map<std::string, std::string> read_index(const fs::path& path) {
  const MappedFile file(path);
  const std::string_view content(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
  const nlohmann::json index = parse_json(content, path.string());
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    fail(path.string(), ": has no object 'weight_map'");
  }
  std::map<std::string, std::string> shards;
  for (const auto& [tensor, shard] : index["weight_map"].items()) {
    if (!shard.is_string())
      fail(path.string(), ": tensor '", tensor, "': the shard ", shard.dump(), " is not a file name");
    const std::string name = shard.get<std::string>();
    if (name.empty() || name == ".." || fs::path(name).filename() != name) {
      fail(path.string(), ": tensor '", tensor, "': the shard '", name,
           "' is not a plain file name in the same directory");
    }
    shards.emplace(tensor, name);
  }
  return shards;
}

/// All at once, since one wrong shard usually means many wrong tensors.
void check_index(const std::map<std::string, std::string>& index,
                 const std::map<std::string, SafetensorsEntry>& entries, const std::vector<fs::path>& paths,
                 const fs::path& where) {
  constexpr size_t kShown = 10;
  std::vector<std::string> problems;
  for (const auto& [tensor, shard] : index) {
    const auto found = entries.find(tensor);
    if (found == entries.end()) {
      problems.push_back(text("tensor '", tensor, "' is not in ", shard));
    } else if (paths[found->second.file].filename() != shard) {
      problems.push_back(
          text("tensor '", tensor, "' is in ", paths[found->second.file].filename().string(), ", not in ", shard));
    }
  }
  for (const auto& [tensor, entry] : entries) {
    if (!index.contains(tensor))
      problems.push_back(
          text("tensor '", tensor, "' of ", paths[entry.file].filename().string(), " is not in the index"));
  }
  if (problems.empty()) return;
  fail(where.string(), " disagrees with its shards:", listed(problems, kShown));
}

/// Copies `box` of a row-major array, one unbroken run of bytes at a time.
void copy_box(const std::byte* source, const Shape& shape, const Box& box, int64_t width, std::byte* target) {
  if (elements(box) == 0) return;
  size_t outer = shape.size();  // dims [0, outer) are walked; the rest is one run
  int64_t run = width;
  while (outer > 0 && (outer == shape.size() || box.size[outer] == shape[outer])) run *= box.size[--outer];
  Shape at(outer, 0);
  for (;;) {
    int64_t offset = 0;
    for (size_t dim = 0; dim < shape.size(); ++dim) {
      offset = offset * shape[dim] + box.begin[dim] + (dim < outer ? at[dim] : 0);
    }
    std::memcpy(target, source + offset * width, static_cast<size_t>(run));
    target += run;
    size_t dim = outer;
    while (dim > 0 && ++at[dim - 1] == box.size[dim - 1]) at[--dim] = 0;
    if (dim == 0) return;
  }
}

}  // namespace

SafetensorsReader::SafetensorsReader(const fs::path& path) {
  std::map<std::string, std::string> index;
  const fs::path index_path = path / kSafetensorsIndex;
  bool indexed = false;
  if (!fs::exists(path)) fail(path.string(), ": there is no such file or directory");
  if (!fs::is_directory(path)) {
    paths_ = {path};
  } else if (fs::exists(path / kSingle)) {  // first, as transformers does
    paths_ = {path / kSingle};
  } else if (fs::exists(index_path)) {
    indexed = true;
    index = read_index(index_path);
    std::set<std::string> shards;
    for (const auto& [tensor, shard] : index) shards.insert(shard);
    for (const std::string& shard : shards) paths_.push_back(path / shard);
  } else {
    fail(path.string(), ": holds neither ", kSingle, " nor ", kSafetensorsIndex, " (other formats of weights are not read)");
  }

  for (size_t file = 0; file < paths_.size(); ++file) {
    if (!fs::exists(paths_[file]))
      fail(paths_[file].string(), ": this shard is missing, but ", index_path.string(), " names it");
    maps_.emplace_back(paths_[file]);
    for (auto& [name, entry] : parse_safetensors(maps_.back().bytes(), paths_[file].string())) {
      entry.file = file;
      const auto [known, is_new] = entries_.emplace(name, entry);
      if (!is_new)
        fail(paths_[file].string(), ": tensor '", name, "' is in ", paths_[known->second.file].string(), ", too");
    }
  }
  if (indexed) check_index(index, entries_, paths_, index_path);
}

Tensor SafetensorsReader::read(const std::string& name, const Box& box) const {
  const auto found = entries_.find(name);
  if (found == entries_.end())
    fail(paths_.empty() ? "" : paths_.front().parent_path().string(), ": tensor '", name, "' is not there");
  const SafetensorsEntry& entry = found->second;
  if (!inside(box, entry.shape)) {
    throw std::logic_error(text("box ", describe(box), " is not inside tensor '", name, "' ", describe(entry.shape)));
  }
  Tensor out = at::empty(box.size, at::TensorOptions(entry.dtype));
  copy_box(maps_[entry.file].bytes().data() + entry.begin, entry.shape, box, out.element_size(),
           static_cast<std::byte*>(out.data_ptr()));
  return out;
}

Tensor SafetensorsReader::read(const std::string& name) const {
  const auto found = entries_.find(name);
  return read(name, found == entries_.end() ? Box{} : whole(found->second.shape));
}

}  // namespace upcycle
