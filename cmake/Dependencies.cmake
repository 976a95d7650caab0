# Finds what the program needs, along CMAKE_PREFIX_PATH and in the system's places; nothing is downloaded. What is missing
# is listed at the end, all at once, one line each.
set(missing_packages "")
function(need found what debian spack)
  if(NOT ${found})
    list(APPEND missing_packages "  ${what}: Debian ${debian}, Spack ${spack}")
    set(missing_packages "${missing_packages}" PARENT_SCOPE)
  endif()
endfunction()

find_package(Threads REQUIRED)

set(MPI_CXX_SKIP_MPICXX ON)
find_package(MPI QUIET COMPONENTS C)
need(MPI_C_FOUND "MPI (Open MPI 4.1)" "libopenmpi-dev openmpi-bin" "openmpi")

set(HDF5_PREFER_PARALLEL ON)
find_package(HDF5 QUIET COMPONENTS C)
need(HDF5_IS_PARALLEL "HDF5 built with MPI" "libhdf5-openmpi-dev" "hdf5 +mpi")
if(HDF5_IS_PARALLEL AND NOT TARGET upcycle::hdf5)
  add_library(upcycle::hdf5 INTERFACE IMPORTED)
  target_include_directories(upcycle::hdf5 SYSTEM INTERFACE ${HDF5_C_INCLUDE_DIRS})
  target_link_libraries(upcycle::hdf5 INTERFACE ${HDF5_C_LIBRARIES})
endif()

find_package(tomlplusplus QUIET)
need(tomlplusplus_FOUND "toml++" "libtomlplusplus-dev" "tomlplusplus")

find_package(spdlog QUIET)
need(spdlog_FOUND "spdlog" "libspdlog-dev" "spdlog")

find_package(Boost QUIET CONFIG COMPONENTS program_options)
need(Boost_program_options_FOUND "Boost.Program_options" "libboost-program-options-dev" "boost +program_options")

find_package(nlohmann_json QUIET)
need(nlohmann_json_FOUND "nlohmann-json" "nlohmann-json3-dev" "nlohmann-json")

find_path(XXHASH_INCLUDE_DIR xxhash.h)
find_library(XXHASH_LIBRARY xxhash)
need(XXHASH_LIBRARY "xxHash" "libxxhash-dev" "xxhash")
if(XXHASH_INCLUDE_DIR AND XXHASH_LIBRARY)
  add_library(upcycle::xxhash INTERFACE IMPORTED)
  target_include_directories(upcycle::xxhash SYSTEM INTERFACE ${XXHASH_INCLUDE_DIR})
  target_link_libraries(upcycle::xxhash INTERFACE ${XXHASH_LIBRARY})
endif()

if(BUILD_TESTING)
  find_package(GTest QUIET)
  need(GTest_FOUND "GoogleTest" "libgtest-dev" "googletest")
endif()

include(Torch)
include(Cuda)

if(missing_packages)
  list(JOIN missing_packages "\n" lines)
  message(NOTICE "Missing (install them, or name their folders in CMAKE_PREFIX_PATH):\n${lines}")
  message(FATAL_ERROR "Some packages are missing; they are listed above.")
endif()
