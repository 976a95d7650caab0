# Finds what the program needs. Everything is looked for along CMAKE_PREFIX_PATH; nothing is downloaded.
find_package(Threads REQUIRED)
set(MPI_CXX_SKIP_MPICXX ON)
find_package(MPI REQUIRED COMPONENTS C)

set(HDF5_PREFER_PARALLEL ON)
find_package(HDF5 REQUIRED COMPONENTS C)
if(NOT HDF5_IS_PARALLEL)
  message(FATAL_ERROR "HDF5 was found, but not the parallel build (Debian: libhdf5-openmpi-dev, Spack: hdf5 +mpi)")
endif()
add_library(upcycle::hdf5 INTERFACE IMPORTED)
target_include_directories(upcycle::hdf5 SYSTEM INTERFACE ${HDF5_C_INCLUDE_DIRS})
target_link_libraries(upcycle::hdf5 INTERFACE ${HDF5_C_LIBRARIES})

find_package(tomlplusplus REQUIRED)
find_package(spdlog REQUIRED)
find_package(Boost REQUIRED COMPONENTS program_options)
find_package(nlohmann_json REQUIRED)

find_path(XXHASH_INCLUDE_DIR xxhash.h REQUIRED)
find_library(XXHASH_LIBRARY xxhash REQUIRED)
add_library(upcycle::xxhash INTERFACE IMPORTED)
target_include_directories(upcycle::xxhash SYSTEM INTERFACE ${XXHASH_INCLUDE_DIR})
target_link_libraries(upcycle::xxhash INTERFACE ${XXHASH_LIBRARY})

# LibTorch: its own CMake files insist on a CUDA toolkit, so link the libraries of the wheel directly.
find_library(TORCH_CPU_LIBRARY torch_cpu PATH_SUFFIXES lib REQUIRED)
find_library(C10_LIBRARY c10 PATH_SUFFIXES lib REQUIRED)
find_path(TORCH_INCLUDE_DIR ATen/ATen.h PATH_SUFFIXES include REQUIRED)
add_library(upcycle::torch INTERFACE IMPORTED)
target_include_directories(upcycle::torch SYSTEM INTERFACE ${TORCH_INCLUDE_DIR})
target_link_libraries(upcycle::torch INTERFACE ${TORCH_CPU_LIBRARY} ${C10_LIBRARY})
target_compile_definitions(upcycle::torch INTERFACE OMPI_SKIP_MPICXX)
