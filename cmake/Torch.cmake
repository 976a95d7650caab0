# LibTorch, as one imported target for the CPU and the CUDA build: what a source file sees does not depend on the preset, so
# ccache shares the objects. The wheel's own CMake files are not used: they insist on a CUDA toolkit even for a CPU program.
#
# Looked for along CMAKE_PREFIX_PATH (.../torch of a wheel, or an unpacked libtorch), else in the Python that has it:
# that of the environment (UPCYCLE_VENV or .venv), else the first python3.
find_program(UPCYCLE_PYTHON NAMES python3 HINTS ENV UPCYCLE_VENV ${PROJECT_SOURCE_DIR}/.venv PATH_SUFFIXES bin
             DOC "Python with torch and transformers, for the tests")
if(UPCYCLE_PYTHON)
  execute_process(COMMAND ${UPCYCLE_PYTHON} -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"
                  OUTPUT_VARIABLE torch_of_python OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()

find_library(TORCH_CPU_LIBRARY torch_cpu PATHS ${torch_of_python}/lib)
need(TORCH_CPU_LIBRARY "LibTorch 2.11" "none (tools/setup or pip install torch==2.11.0)" "py-torch@2.11:")
if(NOT TORCH_CPU_LIBRARY)
  return()
endif()

cmake_path(GET TORCH_CPU_LIBRARY PARENT_PATH torch_lib)
cmake_path(GET torch_lib PARENT_PATH torch_root)
file(STRINGS ${torch_root}/include/torch/headeronly/version.h torch_version REGEX "define TORCH_VERSION_(MAJOR|MINOR) ")
string(REGEX REPLACE "[^0-9]*([0-9]+)[^0-9]+([0-9]+).*" "\\1.\\2" torch_version "${torch_version}")
if(torch_version VERSION_LESS 2.11)
  message(FATAL_ERROR "LibTorch ${torch_version} in ${torch_root} is too old: 2.11 is needed")
endif()
message(STATUS "LibTorch ${torch_version}: ${torch_root}")

add_library(upcycle::torch INTERFACE IMPORTED)
target_include_directories(upcycle::torch SYSTEM INTERFACE ${torch_root}/include)
target_link_libraries(upcycle::torch INTERFACE ${torch_lib}/libtorch_cpu.so ${torch_lib}/libc10.so)
# Without the first, every ATen header includes all operators (5.7 instead of 4.2 s a file); without the second, mpi.h brings in
# Open MPI's old C++ bindings.
target_compile_definitions(upcycle::torch INTERFACE AT_PER_OPERATOR_HEADERS OMPI_SKIP_MPICXX)
