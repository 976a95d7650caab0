#include "checkpoint/hdf5_calls.hpp"

#include <hdf5.h>

namespace upcycle {

void close_hdf5(int64_t id) noexcept { H5Idec_ref(id); }

namespace hdf5 {
namespace {

static_assert(std::is_same_v<hid_t, int64_t>);

/// HDF5 prints its error stack unless told not to, once per process and thread.
void silence() { H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr); }

/// IEEE float32 without its lower 16 bits.
Hdf5Id make_bfloat16() {
  Hdf5Id type = own(H5Tcopy(H5T_IEEE_F32LE), "making the bfloat16 type");
  check(H5Tset_fields(type.get(), 15, 7, 8, 0, 7), "making the bfloat16 type");
  check(H5Tset_precision(type.get(), 16), "making the bfloat16 type");
  check(H5Tset_size(type.get(), 2), "making the bfloat16 type");
  check(H5Tset_ebias(type.get(), 127), "making the bfloat16 type");
  return type;
}

}  // namespace

std::string first_error() {
  std::string out;
  const auto take = [](unsigned, const H5E_error2_t* entry, void* text_) -> herr_t {
    *static_cast<std::string*>(text_) = entry->desc ? entry->desc : "";
    return 1;  // the first one is enough
  };
  H5Ewalk2(H5E_DEFAULT, H5E_WALK_UPWARD, take, &out);
  return out.empty() ? "HDF5 gives no reason" : out;
}

int64_t file_type(at::ScalarType dtype) {
  static const Hdf5Id& bfloat16 =
      *new Hdf5Id(make_bfloat16());  // never closed: HDF5 ends with MPI, before static objects do
  if (dtype == at::kFloat) return H5T_IEEE_F32LE;
  if (dtype == at::kLong) return H5T_STD_I64LE;
  if (dtype == at::kBFloat16) return bfloat16.get();
  throw std::logic_error(text("checkpoints hold no tensors of ", c10::toString(dtype)));
}

at::ScalarType dtype_of(int64_t type, const std::string& where) {
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

uint64_t place_of(const Hdf5Id& dataset) {
  const haddr_t offset = H5Dget_offset(dataset.get());
  return offset == HADDR_UNDEF ? 0 : offset;
}

}  // namespace hdf5
}  // namespace upcycle
