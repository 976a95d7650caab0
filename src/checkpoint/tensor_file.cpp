#include "checkpoint/tensor_file.hpp"

#include <fcntl.h>
#include <hdf5.h>
#include <mpi.h>

#include <algorithm>
#include <cerrno>

#include "base/error.hpp"
#include "checkpoint/blocks.hpp"
#include "checkpoint/durable.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;
static_assert(std::is_same_v<hid_t, int64_t>);

/// No tensor's path: a part of a name has no '.'.
constexpr const char* kChecksums = "/.checksums";

/// The innermost entry of HDF5's error stack, which says what really happened ("No space left on device").
std::string first_error() {
  std::string out;
  const auto take = [](unsigned, const H5E_error2_t* entry, void* text_) -> herr_t {
    *static_cast<std::string*>(text_) = entry->desc ? entry->desc : "";
    return 1;  // the first one is enough
  };
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, take, &out);
  return out.empty() ? "HDF5 gives no reason" : out;
}

/// HDF5 prints its error stack unless told not to, once per process and thread.
void silence() { H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr); }

template <class Result>
Result check(Result result, const std::string& doing) {
  if (result < 0) fail(doing, ": ", first_error());
  return result;
}
Hdf5Id own(hid_t id, const std::string& doing) { return Hdf5Id(check(id, doing)); }

/// IEEE float32 without its lower 16 bits.
Hdf5Id make_bfloat16() {
  Hdf5Id type = own(H5Tcopy(H5T_IEEE_F32LE), "making the bfloat16 type");
  check(H5Tset_fields(type.get(), 15, 7, 8, 0, 7), "making the bfloat16 type");
  check(H5Tset_precision(type.get(), 16), "making the bfloat16 type");
  check(H5Tset_size(type.get(), 2), "making the bfloat16 type");
  check(H5Tset_ebias(type.get(), 127), "making the bfloat16 type");
  return type;
}

/// The type in files and in memory; the same, so that HDF5 only moves bytes.
hid_t file_type(at::ScalarType dtype) {
  static const Hdf5Id& bfloat16 =
      *new Hdf5Id(make_bfloat16());  // never closed: HDF5 ends with MPI, before static objects do
  if (dtype == at::kFloat) return H5T_IEEE_F32LE;
  if (dtype == at::kLong) return H5T_STD_I64LE;
  if (dtype == at::kBFloat16) return bfloat16.get();
  throw std::logic_error(text("checkpoints hold no tensors of ", c10::toString(dtype)));
}

const char* dtype_name(at::ScalarType dtype) {
  return dtype == at::kFloat ? "float32" : dtype == at::kLong ? "int64" : "bfloat16";
}

at::ScalarType dtype_of(hid_t type, const std::string& where) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kLong}) {
    if (H5Tequal(type, file_type(dtype)) > 0) return dtype;
  }
  fail(where, ": its type is none of float32, bfloat16 and int64");
}

Hdf5Id make_space(const Shape& shape) {
  const std::vector<hsize_t> sizes(shape.begin(), shape.end());
  return own(
      shape.empty() ? H5Screate(H5S_SCALAR) : H5Screate_simple(static_cast<int>(sizes.size()), sizes.data(), nullptr),
      "making a data space");
}

Hdf5Id access_properties() {
  silence();
  Hdf5Id access = own(H5Pcreate(H5P_FILE_ACCESS), "preparing HDF5");
  // One fixed file format, whatever the library's version, so that the same content is the same bytes everywhere.
  check(H5Pset_libver_bounds(access.get(), H5F_LIBVER_V110, H5F_LIBVER_V110), "preparing HDF5");
  // HDF5's file locks fail on file systems without flock, and the run directory has a lock of its own.
  check(H5Pset_file_locking(access.get(), false, true), "preparing HDF5");
  return access;
}

Hdf5Id without_times(hid_t kind) {
  Hdf5Id properties = own(H5Pcreate(kind), "preparing HDF5");
  check(H5Pset_obj_track_times(properties.get(), false), "preparing HDF5");
  return properties;
}

void write_attribute(const Hdf5Id& object, const char* key, const std::string& value) {
  const Hdf5Id type = own(H5Tcopy(H5T_C_S1), key);
  check(H5Tset_size(type.get(), value.size()), key);
  check(H5Tset_cset(type.get(), H5T_CSET_UTF8), key);
  check(H5Tset_strpad(type.get(), H5T_STR_NULLPAD), key);
  const Hdf5Id scalar = own(H5Screate(H5S_SCALAR), key);
  const Hdf5Id attribute = own(H5Acreate2(object.get(), key, type.get(), scalar.get(), H5P_DEFAULT, H5P_DEFAULT), key);
  check(H5Awrite(attribute.get(), type.get(), value.data()), key);
}

void make_groups(const Hdf5Id& file, const std::string& path, const Hdf5Id& properties, const std::string& doing) {
  for (size_t slash = path.find('/', 1); slash != std::string::npos; slash = path.find('/', slash + 1)) {
    const std::string group = path.substr(0, slash);
    if (check(H5Lexists(file.get(), group.c_str(), H5P_DEFAULT), doing) == 0) {
      own(H5Gcreate2(file.get(), group.c_str(), H5P_DEFAULT, properties.get(), H5P_DEFAULT), doing);
    }
  }
}

/// Takes the space of a file at once, where the file system can.
void reserve(const fs::path& path, uint64_t bytes) {
  const FileDescriptor descriptor(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644));
  if (!descriptor) fail_with_errno("opening", path);
  if (::fallocate(descriptor.get(), 0, 0, static_cast<off_t>(bytes)) != 0 &&
      (errno == ENOSPC || errno == EDQUOT || errno == EFBIG)) {
    fail_with_errno(text("reserving ", bytes, " bytes for"), path);
  }
}

/// The place of a dataset's bytes in its file.
uint64_t place_of(const Hdf5Id& dataset) {
  const haddr_t offset = H5Dget_offset(dataset.get());
  return offset == HADDR_UNDEF ? 0 : offset;
}

uint64_t blocks_of(const std::vector<TensorSpec>& specs) {
  uint64_t out = 0;
  for (const TensorSpec& spec : specs) out += static_cast<uint64_t>(Blocks(spec.shape, static_cast<int64_t>(c10::elementSize(spec.dtype))).count());
  return out;
}

/// Adds the tensors below `group` (a path) to `out`, depth first.
void collect(const Hdf5Id& file, const std::string& group, const std::string& where, std::vector<std::string>& out) {
  const Hdf5Id id = own(H5Gopen2(file.get(), group.c_str(), H5P_DEFAULT), where);
  H5G_info_t info;
  check(H5Gget_info(id.get(), &info), where);
  for (hsize_t i = 0; i < info.nlinks; ++i) {
    const auto name_at = [&](char* buffer, size_t size) {
      return check(H5Lget_name_by_idx(id.get(), ".", H5_INDEX_NAME, H5_ITER_INC, i, buffer, size, H5P_DEFAULT), where);
    };
    std::string name(static_cast<size_t>(name_at(nullptr, 0)), '\0');
    name_at(name.data(), name.size() + 1);
    const std::string path = (group == "/" ? "" : group) + "/" + name;
    const Hdf5Id object = own(H5Oopen(file.get(), path.c_str(), H5P_DEFAULT), where + ": " + path);
    if (H5Iget_type(object.get()) == H5I_GROUP) collect(file, path, where, out);
    if (H5Iget_type(object.get()) == H5I_DATASET && path != kChecksums) out.push_back(path);
  }
}

}  // namespace

void close_hdf5(int64_t id) noexcept {
  // A file whose metadata can't be written (full disk) must stay open: HDF5 would free it, fail, keep the id, and crash
  // on it when the process ends.
  if (H5Iget_type(id) == H5I_FILE && H5Fflush(id, H5F_SCOPE_GLOBAL) < 0) return;
  H5Idec_ref(id);
}

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

Extents TensorFile::create(const fs::path& path, std::vector<TensorSpec> specs) {
  std::sort(specs.begin(), specs.end(), [](const TensorSpec& a, const TensorSpec& b) { return a.name < b.name; });
  const std::string doing = "creating " + path.string();
  uint64_t bytes = 0;
  for (const TensorSpec& spec : specs)
    bytes += static_cast<uint64_t>(elements(spec.shape)) * c10::elementSize(spec.dtype);
  check_free_space(path, bytes, path.filename().string());
  // Data and more than enough for metadata. HDF5 must not be the one who finds out: it can't close a file that it can't
  // extend, and crashes on it when the process ends.
  const uint64_t blocks = blocks_of(specs);
  reserve(path, bytes + 8 * blocks + 8192 * specs.size() + (4 << 20));
  const Hdf5Id access = access_properties();
  // Big datasets on page borders; metadata in blocks of its own instead of strewn between the data.
  check(H5Pset_alignment(access.get(), 64 << 10, 4096), doing);
  check(H5Pset_meta_block_size(access.get(), 1 << 20), doing);
  const Hdf5Id of_file = without_times(H5P_FILE_CREATE), of_group = without_times(H5P_GROUP_CREATE),
               of_dataset = without_times(H5P_DATASET_CREATE);
  check(H5Pset_layout(of_dataset.get(), H5D_CONTIGUOUS), doing);
  check(H5Pset_alloc_time(of_dataset.get(), H5D_ALLOC_TIME_EARLY), doing);
  check(H5Pset_fill_time(of_dataset.get(), H5D_FILL_TIME_NEVER), doing);
  const Hdf5Id of_checksums = without_times(H5P_DATASET_CREATE);   // written by HDF5: a block that nobody wrote has 0
  check(H5Pset_alloc_time(of_checksums.get(), H5D_ALLOC_TIME_EARLY), doing);
  check(H5Pset_fill_time(of_checksums.get(), H5D_FILL_TIME_ALLOC), doing);
  Extents extents;
  {
    TensorFile file(own(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, of_file.get(), access.get()), doing), path.string());
    for (const TensorSpec& spec : specs) {
      const std::string tensor = text(doing, ": tensor '", spec.name, "'");
      const std::string place = hdf5_path(spec.name);
      make_groups(file.id_, place, of_group, tensor);
      const Hdf5Id dataset = own(H5Dcreate2(file.id_.get(), place.c_str(), file_type(spec.dtype),
                                            make_space(spec.shape).get(), H5P_DEFAULT, of_dataset.get(), H5P_DEFAULT),
                                 tensor);
      write_attribute(dataset, "name", spec.name);
      write_attribute(dataset, "dtype", dtype_name(spec.dtype));
    }
    const Hdf5Id checksums = own(H5Dcreate2(file.id_.get(), kChecksums, H5T_STD_U64LE, make_space({static_cast<int64_t>(blocks)}).get(),
                                            H5P_DEFAULT, of_checksums.get(), H5P_DEFAULT), doing);
    write_attribute(checksums, "algorithm", "XXH3-64");
    write_attribute(checksums, "block_bytes", std::to_string(Blocks::kBytes));
    extents = file.extents(specs);
    file.close();
  }
  reserve(path, fs::file_size(path));
  make_durable(path);
  return extents;
}

Extents TensorFile::extents(std::span<const TensorSpec> specs) const {
  Extents out;
  for (const TensorSpec& spec : specs) out.offsets.push_back(dataset(spec.name).offset());
  const Hdf5Id checksums = own(H5Dopen2(id_.get(), kChecksums, H5P_DEFAULT), path_);
  out.checksums = place_of(checksums);
  return out;
}

void TensorFile::create_index(const fs::path& path, const std::map<std::string, std::vector<TensorSpec>>& parts) {
  const std::string doing = "creating " + path.string();
  const Hdf5Id access = access_properties(), of_file = without_times(H5P_FILE_CREATE), of_group = without_times(H5P_GROUP_CREATE);
  TensorFile file(own(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, of_file.get(), access.get()), doing), path.string());
  for (const auto& [part, specs] : parts) {
    for (const TensorSpec& spec : specs) {
      const std::string place = hdf5_path(spec.name);
      make_groups(file.id_, place, of_group, doing);
      check(H5Lcreate_external(part.c_str(), place.c_str(), file.id_.get(), place.c_str(), H5P_DEFAULT, H5P_DEFAULT), doing);
    }
  }
  file.close();
  make_durable(path);
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

TensorFile TensorFile::open_for_writing(const fs::path& path, const Communicator& world) {
  const Hdf5Id access = access_properties();
  check(H5Pset_sieve_buf_size(access.get(), 0), "preparing HDF5");  // errors show in the write that causes them
  int mpi_is_up = 0;
  MPI_Initialized(&mpi_is_up);  // a process alone may write without MPI
  if (mpi_is_up)
    check(H5Pset_fapl_mpio(access.get(), MPI_Comm_f2c(world.mpi_handle()), MPI_INFO_NULL), "preparing MPI-IO");
  const std::string doing = "opening " + path.string() + " for writing";
  return TensorFile(own(H5Fopen(path.c_str(), H5F_ACC_RDWR, access.get()), doing), path.string());
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
  check(H5Fflush(id_.get(), H5F_SCOPE_GLOBAL), doing);
  id_.reset();
}

}  // namespace upcycle
