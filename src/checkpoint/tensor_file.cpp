#include "checkpoint/tensor_file.hpp"

#include <hdf5.h>
#include <mpi.h>

#include <algorithm>

#include "checkpoint/hdf5_calls.hpp"
#include "checkpoint/hdf5_driver.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;
using namespace hdf5;

herr_t add_name(hid_t, const char* name, const H5L_info_t*, void* names) {
  static_cast<std::vector<std::string>*>(names)->push_back(name);
  return 0;
}

/// Adds the tensors below `group` (a path) to `out`, depth first.
void collect(const Hdf5Id& file, const std::string& group, const std::string& where, std::vector<std::string>& out) {
  const Hdf5Id id = own(H5Gopen2(file.get(), group.c_str(), H5P_DEFAULT), where);
  std::vector<std::string> names;   // at once: a group of many is sorted anew for each name that is asked for by number
  check(H5Literate(id.get(), H5_INDEX_NAME, H5_ITER_INC, nullptr, add_name, &names), where);
  for (const std::string& name : names) {
    const std::string path = (group == "/" ? "" : group) + "/" + name;
    const Hdf5Id object = own(H5Oopen(file.get(), path.c_str(), H5P_DEFAULT), where + ": " + path);
    if (H5Iget_type(object.get()) == H5I_GROUP) collect(file, path, where, out);
    if (H5Iget_type(object.get()) == H5I_DATASET && path != kChecksums) out.push_back(path);
  }
}

}  // namespace

std::string hdf5_path(const std::string& name) {
  const std::string framed = "." + name + ".";
  if (name.empty() || framed.find("..") != std::string::npos ||
      name.find_first_of(std::string_view("/\0", 2)) != std::string::npos) {
    throw std::logic_error(
        text("'", name, "' can't name a tensor: it needs parts separated by '.', none of them empty or with '/'"));
  }
  std::string path = "/" + name;
  std::replace(path.begin(), path.end(), '.', '/');
  return path;
}

std::string name_of_path(const std::string& path) {
  std::string name = path.substr(path.starts_with('/') ? 1 : 0);
  std::replace(name.begin(), name.end(), '/', '.');
  return name;
}

void StoredDataset::write(const Box& box, const void* source) const {
  const std::string doing = text("writing ", file_, ": tensor '", spec_.name, "'");
  if (!inside(box, spec_.shape))
    throw std::logic_error(
        text(doing, ": box ", upcycle::describe(box), " is not inside ", upcycle::describe(spec_.shape)));
  if (elements(box) == 0) return;
  const Hdf5Id in_file = make_space(spec_.shape);
  const Hdf5Id in_memory = make_space(box.size);
  if (!box.size.empty()) {
    const std::vector<hsize_t> begin(box.begin.begin(), box.begin.end()), size(box.size.begin(), box.size.end());
    check(H5Sselect_hyperslab(in_file.get(), H5S_SELECT_SET, begin.data(), nullptr, size.data(), nullptr), doing);
  }
  if (H5Dwrite(id_.get(), file_type(spec_.dtype), in_memory.get(), in_file.get(), H5P_DEFAULT, source) < 0) {
    // MPI-IO does not say why.
    fail(doing, ": ", first_error(),
         " (a full disk, a quota, or a limit on file sizes? Free some space, or choose another directory)");
  }
}

Extents TensorFile::extents(std::span<const TensorSpec> specs) const {
  Extents out;
  for (const TensorSpec& spec : specs) out.offsets.push_back(dataset(spec.name).offset());
  const Hdf5Id checksums = own(H5Dopen2(id_.get(), kChecksums, H5P_DEFAULT), path_);
  out.checksums = place_of(checksums);
  return out;
}

std::vector<uint64_t> TensorFile::checksums() const {
  if (check(H5Lexists(id_.get(), kChecksums, H5P_DEFAULT), path_) == 0) return {};
  const std::string where = path_ + ": " + kChecksums;
  const Hdf5Id dataset = own(H5Dopen2(id_.get(), kChecksums, H5P_DEFAULT), where);
  const Hdf5Id space = own(H5Dget_space(dataset.get()), where), type = own(H5Dget_type(dataset.get()), where);
  if (H5Tequal(type.get(), H5T_STD_U64LE) <= 0 || H5Sget_simple_extent_ndims(space.get()) != 1) fail(where, ": is no list of checksums");
  std::vector<uint64_t> out(static_cast<size_t>(H5Sget_simple_extent_npoints(space.get())));
  if (!out.empty()) check(H5Dread(dataset.get(), H5T_STD_U64LE, H5S_ALL, H5S_ALL, H5P_DEFAULT, out.data()), where);
  return out;
}

TensorFile TensorFile::open_for_writing(const fs::path& path) {
  const Hdf5Id values = access_properties();
  int mpi_is_up = 0;
  MPI_Initialized(&mpi_is_up);  // a process alone may write without MPI
  // Nobody else's: what is opened by all ranks must be closed by all, and one that fails would leave the others waiting for it.
  if (mpi_is_up) check(H5Pset_fapl_mpio(values.get(), MPI_COMM_SELF, MPI_INFO_NULL), "preparing MPI-IO");
  const auto driven = std::make_shared<DrivenFile>();
  const Hdf5Id access = access_for_values(driven, values);
  check(H5Pset_sieve_buf_size(access.get(), 0), "preparing HDF5");  // errors show in the write that causes them
  const std::string doing = "opening " + path.string() + " for writing";
  return TensorFile(own(H5Fopen(path.c_str(), H5F_ACC_RDWR, access.get()), doing), path.string(), driven);
}

TensorFile TensorFile::open(const fs::path& path) {
  const std::string doing = "opening " + path.string();
  return TensorFile(own(H5Fopen(path.c_str(), H5F_ACC_RDONLY, access_properties().get()), doing), path.string());
}

bool TensorFile::contains(const std::string& name) const {
  const std::string path = hdf5_path(name);
  for (size_t slash = path.find('/', 1);; slash = path.find('/', slash + 1)) {  // HDF5 asks about one link at a time
    if (H5Lexists(id_.get(), path.substr(0, slash).c_str(), H5P_DEFAULT) <= 0) return false;
    if (slash == std::string::npos) return true;
  }
}

StoredDataset TensorFile::dataset(const std::string& name) const {
  const std::string where = text(path_, ": tensor '", name, "'");
  StoredDataset out;
  out.file_ = path_;
  out.id_ = own(H5Dopen2(id_.get(), hdf5_path(name).c_str(), H5P_DEFAULT), where);
  const Hdf5Id type = own(H5Dget_type(out.id_.get()), where);
  const Hdf5Id space = own(H5Dget_space(out.id_.get()), where);
  std::vector<hsize_t> sizes(static_cast<size_t>(check(H5Sget_simple_extent_ndims(space.get()), where)));
  check(H5Sget_simple_extent_dims(space.get(), sizes.data(), nullptr), where);
  out.spec_ = {name, dtype_of(type.get(), where), Shape(sizes.begin(), sizes.end())};
  if (elements(out.spec_.shape) > 0) {
    out.offset_ = place_of(out.id_);
    if (out.offset_ == 0) fail(where, ": is not stored in one piece: not a file of this program");
  }
  return out;
}

std::vector<std::pair<TensorSpec, uint64_t>> TensorFile::list() const {
  std::vector<std::string> paths;
  collect(id_, "/", path_, paths);
  std::vector<std::pair<TensorSpec, uint64_t>> out;
  for (const std::string& path : paths) {
    const StoredDataset found = dataset(name_of_path(path));
    out.emplace_back(found.spec(), found.offset());
  }
  return out;
}

void TensorFile::close() {
  const std::string doing = "closing " + path_;
  check(H5Fclose(id_.release()), doing);
  if (driven_ && driven_->close_failed) fail(doing, ": the file system says that this failed; is its disk full, or not to be reached?");
}

}  // namespace upcycle
