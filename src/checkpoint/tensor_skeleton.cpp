// The making of checkpoint files, by one process alone: everything but the values.
#include <hdf5.h>

#include <algorithm>

#include "checkpoint/durable.hpp"
#include "checkpoint/hdf5_calls.hpp"
#include "checkpoint/hdf5_driver.hpp"
#include "checkpoint/tensor_file.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;
using namespace hdf5;

const char* dtype_name(at::ScalarType dtype) {
  return dtype == at::kFloat ? "float32" : dtype == at::kLong ? "int64" : "bfloat16";
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

}  // namespace

Extents TensorFile::create(const fs::path& path, std::vector<TensorSpec> specs) {
  std::sort(specs.begin(), specs.end(), [](const TensorSpec& a, const TensorSpec& b) { return a.name < b.name; });
  const std::string doing = "creating " + path.string();
  uint64_t bytes = 0, blocks = 0;
  for (const TensorSpec& spec : specs) {
    bytes += static_cast<uint64_t>(spec.bytes());
    blocks += static_cast<uint64_t>(spec.blocks().count());
  }
  check_free_space(path, bytes, path.filename().string());
  const auto driven = std::make_shared<DrivenFile>();
  const Hdf5Id access = access_in_memory(driven);
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
    TensorFile file(own(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, of_file.get(), access.get()), doing), path.string(), driven);
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
  driven->memory.store(path);
  return extents;
}

void TensorFile::create_index(const fs::path& path, const std::map<std::string, std::vector<TensorSpec>>& parts) {
  const std::string doing = "creating " + path.string();
  const auto driven = std::make_shared<DrivenFile>();
  const Hdf5Id access = access_in_memory(driven), of_file = without_times(H5P_FILE_CREATE), of_group = without_times(H5P_GROUP_CREATE);
  TensorFile file(own(H5Fcreate(path.c_str(), H5F_ACC_TRUNC, of_file.get(), access.get()), doing), path.string(), driven);
  for (const auto& [part, specs] : parts) {
    for (const TensorSpec& spec : specs) {
      const std::string place = hdf5_path(spec.name);
      make_groups(file.id_, place, of_group, doing);
      check(H5Lcreate_external(part.c_str(), place.c_str(), file.id_.get(), place.c_str(), H5P_DEFAULT, H5P_DEFAULT), doing);
    }
  }
  file.close();
  driven->memory.store(path);
}

}  // namespace upcycle
