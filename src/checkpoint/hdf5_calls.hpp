#pragma once
#include <c10/core/ScalarType.h>

#include <string>

#include "base/box.hpp"
#include "base/error.hpp"
#include "checkpoint/tensor_file.hpp"

/// What the files of this folder that call HDF5 share: its errors as ours, its types and properties as checkpoints want them. Ids are
/// hid_t.
namespace upcycle::hdf5 {

/// The path of the checksums in every file; no tensor's: a part of a name has no '.'.
inline constexpr const char* kChecksums = "/.checksums";

/// The innermost entry of HDF5's error stack, which says what really happened ("No space left on device").
std::string first_error();

/// `result`, or UserError for one below 0: "<doing>: <first_error>".
template <class Result>
Result check(Result result, const std::string& doing) {
  if (result < 0) fail(doing, ": ", first_error());
  return result;
}
inline Hdf5Id own(int64_t id, const std::string& doing) { return Hdf5Id(check(id, doing)); }

/// The type of a dtype in files and in memory; the same, so that HDF5 only moves bytes. std::logic_error for others than TensorSpec's.
int64_t file_type(at::ScalarType dtype);
/// The dtype of which that is the type; UserError for all others.
at::ScalarType dtype_of(int64_t type, const std::string& where);

Hdf5Id make_space(const Shape& shape);
/// How files are opened and made. From here on HDF5 prints nothing.
Hdf5Id access_properties();
/// The place of a dataset's bytes in its file; 0: it has none.
uint64_t place_of(const Hdf5Id& dataset);

}  // namespace upcycle::hdf5
