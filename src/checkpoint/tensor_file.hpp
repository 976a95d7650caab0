#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/handle.hpp"
#include "checkpoint/tensor_spec.hpp"

namespace upcycle {

namespace hdf5 {
struct DrivenFile;
}

void close_hdf5(int64_t id) noexcept;
constexpr int64_t no_hdf5() noexcept { return -1; }
using Hdf5Id = Handle<int64_t, close_hdf5, no_hdf5>;  ///< an hid_t; hdf5.h stays out of headers

/// The HDF5 path of a tensor: "model.norm.weight" -> "/model/norm/weight", so that a file browses as the tree of
/// modules; and back. Exact both ways for every name without '/' and NUL and without empty parts; std::logic_error on
/// others.
std::string hdf5_path(const std::string& name);
std::string name_of_path(const std::string& path);

/// Where a file's bytes lie. A dataset without elements has no place.
struct Extents {
  std::vector<uint64_t> offsets;   ///< of each tensor's first byte, in the order of the names
  uint64_t checksums = 0;          ///< of the first checksum; none: 0
};

/// One tensor of a TensorFile. Boxes must lie inside its shape.
class StoredDataset {
 public:
  const TensorSpec& spec() const noexcept { return spec_; }
  /// Of its first byte in file(); 0 without elements.
  uint64_t offset() const noexcept { return offset_; }
  /// `source`: the box in row-major order, in the stored dtype. Independent: other ranks may do something else meanwhile. Throws
  /// UserError with HDF5's own words.
  void write(const Box& box, const void* source) const;

 private:
  friend class TensorFile;
  TensorSpec spec_;
  std::string file_;
  uint64_t offset_ = 0;
  Hdf5Id id_;
};

/// An HDF5 file of global tensors, one contiguous dataset each. bfloat16 is a 16-bit float type of the file. No value
/// is ever converted by HDF5 (slow, and it rounds ties away from zero). All HDF5 calls of a process must come from one
/// thread. Throws UserError naming file and tensor, with the first line of HDF5's error stack; HDF5 itself prints
/// nothing.
class TensorFile {
 public:
  /// Makes the file with all datasets allocated and no data in them, fsynced. By one process alone: 20,000 datasets take a second,
  /// against five when all ranks create them together. Reserves the disk space where the file system can, so that a full disk shows
  /// now. The same specs in any order give the same bytes. Beside the tensors there is room for the checksum of every block (Blocks), all 0.
  static Extents create(const std::filesystem::path& path, std::vector<TensorSpec> specs);
  /// The extents of what create() made, for specs in the order of their names.
  Extents extents(std::span<const TensorSpec> specs) const;
  /// A file without data through which `parts`, files beside it with their tensors, look like one: external links.
  static void create_index(const std::filesystem::path& path, const std::map<std::string, std::vector<TensorSpec>>& parts);

  /// Opens what create() made to write values by MPI-IO, each rank by itself.
  static TensorFile open_for_writing(const std::filesystem::path& path);

  /// By this process alone, read-only.
  static TensorFile open(const std::filesystem::path& path);

  StoredDataset dataset(const std::string& name) const;
  bool contains(const std::string& name) const;
  /// The checksums of every block, by the order of the tensors' names; empty for a file that has none (schema version 1).
  std::vector<uint64_t> checksums() const;
  /// All tensors, each with the place of its first byte, in no particular order. Throws UserError on datasets of foreign types.
  std::vector<std::pair<TensorSpec, uint64_t>> list() const;

  /// Throws where the destructor would hide a failure.
  void close();

 private:
  TensorFile(Hdf5Id id, std::string path, std::shared_ptr<const hdf5::DrivenFile> driven = nullptr)
      : id_(std::move(id)), path_(std::move(path)), driven_(std::move(driven)) {}
  Hdf5Id id_;
  std::string path_;
  std::shared_ptr<const hdf5::DrivenFile> driven_;   ///< of what is written
};

}  // namespace upcycle
