# The CUDA half, one option: CUDA toolkit, the CUDA libraries of LibTorch, and NCCL. Needs no GPU to compile.
find_program(UPCYCLE_NVCC nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin)
if(UPCYCLE_NVCC)
  set(nvcc_there ON)
else()
  set(nvcc_there OFF)
endif()
option(UPCYCLE_CUDA "Build for GPUs: CUDA kernels and NCCL" ${nvcc_there})
set(UPCYCLE_CUDA_ARCH "9.0a" CACHE STRING "GPUs to compile for, as torch writes them; releases: 8.0;9.0a;10.0+PTX")
if(NOT UPCYCLE_CUDA OR NOT TORCH_CPU_LIBRARY)
  return()
endif()
need(UPCYCLE_NVCC "CUDA toolkit 13 (nvcc)" "none (NVIDIA's cuda-toolkit-13-0; the preset cpu needs it not)" "cuda@13:")
if(NOT UPCYCLE_NVCC)
  return()
endif()

# "9.0a" is code for that GPU only, "8.0+PTX" also for later ones.
set(CMAKE_CUDA_ARCHITECTURES "")
foreach(arch ${UPCYCLE_CUDA_ARCH})
  string(REGEX REPLACE "^([0-9]+)\\.([0-9]+[af]?)(\\+PTX)?$" "\\1\\2" number "${arch}")
  if(NOT number MATCHES "^[0-9]+[af]?$")
    message(FATAL_ERROR "UPCYCLE_CUDA_ARCH: '${arch}' is not of the form 9.0a or 8.0+PTX")
  endif()
  if(NOT arch MATCHES "PTX$")
    string(APPEND number "-real")
  endif()
  list(APPEND CMAKE_CUDA_ARCHITECTURES ${number})
endforeach()
set(CMAKE_CUDA_COMPILER ${UPCYCLE_NVCC} CACHE FILEPATH "")
set(CMAKE_CUDA_STANDARD 20)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY None)  # the runtime that LibTorch uses, see below; never a second one
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

# Wheels bring the runtime and NCCL that their torch was built with, in folders beside it: those must be the ones we use.
cmake_path(GET torch_root PARENT_PATH site_packages)
find_library(CUDART_LIBRARY NAMES libcudart.so.${CUDAToolkit_VERSION_MAJOR} PATHS ${site_packages}/nvidia/cu${CUDAToolkit_VERSION_MAJOR}/lib
             NO_DEFAULT_PATH)
if(NOT CUDART_LIBRARY)
  set(CUDART_LIBRARY ${CUDA_cudart_LIBRARY})
endif()
find_path(NCCL_INCLUDE_DIR nccl.h PATHS ${site_packages}/nvidia/nccl/include NO_DEFAULT_PATH)
find_path(NCCL_INCLUDE_DIR nccl.h)
find_library(NCCL_LIBRARY NAMES libnccl.so.2 PATHS ${site_packages}/nvidia/nccl/lib NO_DEFAULT_PATH)
find_library(NCCL_LIBRARY NAMES nccl)
need(NCCL_LIBRARY "NCCL 2" "none (in torch's wheel, or NVIDIA's libnccl-dev)" "nccl")

find_path(CUTLASS_INCLUDE_DIR cutlass/gemm/group_array_problem_shape.hpp PATHS ${site_packages}/cutlass_library/source/include NO_DEFAULT_PATH)
find_path(CUTLASS_INCLUDE_DIR cutlass/gemm/group_array_problem_shape.hpp)
need(CUTLASS_INCLUDE_DIR "CUTLASS 4 (headers)" "none (tools/setup or pip install --no-deps nvidia-cutlass==4.2.0.0)" "cutlass@4:")

# torch_cuda registers its kernels when it is loaded, though nothing names a symbol of it: no linker may drop it.
add_library(upcycle::torch_cuda INTERFACE IMPORTED)
target_include_directories(upcycle::torch_cuda SYSTEM INTERFACE ${CUDAToolkit_INCLUDE_DIRS})
target_link_libraries(upcycle::torch_cuda INTERFACE
  -Wl,--push-state,--no-as-needed,${torch_lib}/libtorch_cuda.so,${torch_lib}/libc10_cuda.so,--pop-state ${CUDART_LIBRARY})

add_library(upcycle::cutlass INTERFACE IMPORTED)
target_include_directories(upcycle::cutlass SYSTEM INTERFACE ${CUTLASS_INCLUDE_DIR})

add_library(upcycle::nccl INTERFACE IMPORTED)
target_include_directories(upcycle::nccl SYSTEM INTERFACE ${NCCL_INCLUDE_DIR})
target_link_libraries(upcycle::nccl INTERFACE ${NCCL_LIBRARY} upcycle::torch_cuda)
message(STATUS "CUDA ${CUDAToolkit_VERSION} for ${UPCYCLE_CUDA_ARCH}; runtime ${CUDART_LIBRARY}; NCCL ${NCCL_LIBRARY}")
