#pragma once
#include <memory>

#include "checkpoint/file_in_memory.hpp"
#include "checkpoint/tensor_file.hpp"

namespace upcycle::hdf5 {

/// One opened HDF5 file of which nothing but values goes to a disk. HDF5 1.10 can't close a file that it can't write (a full disk, a failing
/// one): it tries again when the process ends, and crashes; and with MPI-IO a rank that fails in there leaves the others waiting. So what it
/// writes of its own stays in memory, where nothing fails.
struct DrivenFile {
  FileInMemory memory;
  bool close_failed = false;   ///< of the file of values, or reading in it what the close needs
};

/// Properties for H5Fcreate: all of the file is in the memory of `file`. Whoever has closed it stores it.
Hdf5Id access_in_memory(const std::shared_ptr<DrivenFile>& file);
/// Properties for H5Fopen to write values into datasets that are there: these go by `values`, properties too, at once, and H5Dwrite says
/// what went wrong; the rest is read through it, and what HDF5 changes there is forgotten: it is nothing that a reader needs.
Hdf5Id access_for_values(const std::shared_ptr<DrivenFile>& file, const Hdf5Id& values);

}  // namespace upcycle::hdf5
