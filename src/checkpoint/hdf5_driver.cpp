#include "checkpoint/hdf5_driver.hpp"

#include <hdf5.h>
#if __has_include(<H5FDdevelop.h>)   // where HDF5 1.14 has what drivers need
#include <H5FDdevelop.h>
#endif

#include <algorithm>

#include "checkpoint/hdf5_calls.hpp"

namespace upcycle::hdf5 {
namespace {

/// What the properties hand to open(). HDF5 copies its bytes, and takes no notice of them once a file is open.
struct Told {
  const std::shared_ptr<DrivenFile>* file;
  int64_t values;   ///< 0: in memory
};

struct Opened {
  H5FD_t own;   // HDF5's, so the first
  std::shared_ptr<DrivenFile> file;
  H5FD_t* values = nullptr;
  haddr_t size = 0;   ///< of the file of values, which stays what it is; asked once, MPI-IO forgets it with the first write
  haddr_t end = 0;    ///< as far as HDF5 has given out places
};

Opened& of(H5FD_t* file) { return *reinterpret_cast<Opened*>(file); }
const Opened& of(const H5FD_t* file) { return *reinterpret_cast<const Opened*>(file); }

// The pages of a file that is there.
FileInMemory::Load pages_of(H5FD_t* file, haddr_t size) {
  return [file, size](uint64_t offset, std::span<std::byte> page) {
    const uint64_t there = offset < size ? std::min<uint64_t>(page.size(), size - offset) : 0;
    return there == 0 || H5FDread(file, H5FD_MEM_SUPER, H5P_DEFAULT, offset, there, page.data()) >= 0;
  };
}

H5FD_t* open_file(const char* name, unsigned flags, hid_t access, haddr_t most) {
  const auto* told = static_cast<const Told*>(H5Pget_driver_info(access));
  if (!told) return nullptr;
  auto opened = std::make_unique<Opened>(Opened{.own = {}, .file = *told->file});
  if (told->values != 0) {
    opened->values = H5FDopen(name, flags, told->values, most);
    if (!opened->values) return nullptr;
    opened->size = H5FDget_eof(opened->values, H5FD_MEM_DEFAULT);
    if (opened->size == HADDR_UNDEF || H5FDset_eoa(opened->values, H5FD_MEM_DEFAULT, opened->size) < 0) {
      H5FDclose(opened->values);
      return nullptr;
    }
  }
  opened->file->memory = FileInMemory(opened->values ? pages_of(opened->values, opened->size) : nullptr);
  return &opened.release()->own;
}

// Never fails, see DrivenFile; who closes asks.
herr_t close_file(H5FD_t* file) {
  const std::unique_ptr<Opened> opened(&of(file));
  if (opened->values && H5FDclose(opened->values) < 0) opened->file->close_failed = true;
  return 0;
}

// What makes the layout of a file, as for files on a disk.
herr_t query(const H5FD_t*, unsigned long* features) {
  *features = H5FD_FEAT_AGGREGATE_METADATA | H5FD_FEAT_ACCUMULATE_METADATA | H5FD_FEAT_AGGREGATE_SMALLDATA;
  return 0;
}

haddr_t get_end(const H5FD_t* file, H5FD_mem_t) { return of(file).end; }

herr_t set_end(H5FD_t* file, H5FD_mem_t, haddr_t end) {
  of(file).end = end;
  return 0;
}

haddr_t get_size(const H5FD_t* file, H5FD_mem_t) {
  const Opened& opened = of(file);
  return opened.values ? opened.size : opened.file->memory.size();
}

herr_t read(H5FD_t* file, H5FD_mem_t, hid_t, haddr_t offset, size_t size, void* to) {
  return of(file).file->memory.read({static_cast<std::byte*>(to), size}, offset) ? 0 : -1;
}

herr_t write(H5FD_t* file, H5FD_mem_t type, hid_t, haddr_t offset, size_t size, const void* from) {
  Opened& opened = of(file);
  if (type != H5FD_MEM_DRAW || !opened.values) {
    // The rest of a page may not be readable: that must not fail here either, and who closes is told.
    if (!opened.file->memory.write({static_cast<const std::byte*>(from), size}, offset)) opened.file->close_failed = true;
    return 0;
  }
  return H5FDwrite(opened.values, type, H5P_DEFAULT, offset, size, from);
}

herr_t truncate(H5FD_t* file, hid_t, hbool_t) {
  Opened& opened = of(file);
  if (!opened.values) opened.file->memory.resize(opened.end);
  return 0;
}

hid_t driver() {
  static const hid_t id = [] {
    static H5FD_class_t self{};
#ifdef H5FD_CLASS_VERSION   // HDF5 1.14 again
    self.version = H5FD_CLASS_VERSION;
    self.value = H5_VFD_RESERVED;
#endif
    self.name = "upcycle";
    self.maxaddr = (haddr_t{1} << 63) - 1;
    self.fc_degree = H5F_CLOSE_WEAK;
    self.fapl_size = sizeof(Told);
    self.open = open_file;
    self.close = close_file;
    self.query = query;
    self.get_eoa = get_end;
    self.set_eoa = set_end;
    self.get_eof = get_size;
    self.read = read;
    self.write = write;
    self.truncate = truncate;
    constexpr H5FD_mem_t kinds[] = H5FD_FLMAP_DICHOTOMY;
    std::copy(std::begin(kinds), std::end(kinds), self.fl_map);
    return check(H5FDregister(&self), "preparing HDF5");
  }();
  return id;
}

Hdf5Id access(const std::shared_ptr<DrivenFile>& file, int64_t values) {
  Hdf5Id out = access_properties();
  const Told told{&file, values};
  check(H5Pset_driver(out.get(), driver(), &told), "preparing HDF5");
  return out;
}

}  // namespace

Hdf5Id access_in_memory(const std::shared_ptr<DrivenFile>& file) { return access(file, 0); }
Hdf5Id access_for_values(const std::shared_ptr<DrivenFile>& file, const Hdf5Id& values) { return access(file, values.get()); }

}  // namespace upcycle::hdf5
