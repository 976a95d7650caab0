# How to compile and link: standard, warnings, ccache, mold.
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_EXPORT_COMPILE_COMMANDS ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()

# Paths relative to the source folder, so that clones and both presets share what is cached; the rest lets precompiled headers be cached.
find_program(CCACHE ccache)
if(CCACHE AND (NOT CMAKE_CXX_COMPILER_LAUNCHER OR CMAKE_CXX_COMPILER_LAUNCHER STREQUAL ccache))
  set(CMAKE_CXX_COMPILER_LAUNCHER env CCACHE_BASEDIR=${PROJECT_SOURCE_DIR} CCACHE_NOHASHDIR=1
      CCACHE_SLOPPINESS=pch_defines,time_macros ${CCACHE})
  set(CMAKE_CUDA_COMPILER_LAUNCHER ${CMAKE_CXX_COMPILER_LAUNCHER})
  add_compile_options("$<$<COMPILE_LANGUAGE:CXX>:-ffile-prefix-map=${PROJECT_SOURCE_DIR}/=;-fpch-preprocess>")
endif()

include(CheckLinkerFlag)
check_linker_flag(CXX -fuse-ld=mold UPCYCLE_MOLD)
if(UPCYCLE_MOLD)
  # Without RELRO: mold 1.10 (Debian 12) lets its segment begin at the thread-local data in front of it, and where the next section begins a
  # page (one program of some hundred) the loader refuses: "cannot apply additional memory protection after relocation".
  add_link_options(-fuse-ld=mold LINKER:-z,norelro)
endif()
