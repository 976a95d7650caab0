# The two readers of files that others may have written or damaged, by libFuzzer under AddressSanitizer and UndefinedBehaviorSanitizer. Half a
# minute each here; longer by hand:  build/cpu/tests/fuzz/fuzz_manifest -dict=tests/fuzz/json.dict NEW_INPUTS tests/fuzz/corpus/manifest
# An input that crashes stays as crash-* in build/.../tests/fuzz; give it to the program to see it again.
#
# clang++ compiles these few files itself, whatever builds the rest; of LibTorch they need c10 only.
find_program(UPCYCLE_CLANGXX NAMES clang++ clang++-19 clang++-16 clang++-14)
set(fuzz_flags -std=c++20 -g1 -O1 -fno-omit-frame-pointer -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all)
set(fuzz_problem "there is no clang++ (Debian: clang libclang-rt-dev)")
if(UPCYCLE_CLANGXX)
  file(WRITE ${CMAKE_CURRENT_BINARY_DIR}/fuzz/try.cpp "extern \"C\" int LLVMFuzzerTestOneInput(const unsigned char*, decltype(sizeof 0)) { return 0; }\n")
  execute_process(COMMAND ${UPCYCLE_CLANGXX} ${fuzz_flags} -fsanitize=fuzzer ${CMAKE_CURRENT_BINARY_DIR}/fuzz/try.cpp -o ${CMAKE_CURRENT_BINARY_DIR}/fuzz/try
                  RESULT_VARIABLE failed OUTPUT_QUIET ERROR_QUIET)
  set(fuzz_problem "")
  if(failed)
    set(fuzz_problem "${UPCYCLE_CLANGXX} has no libFuzzer (Debian: libclang-rt-dev)")
  endif()
endif()

set(fuzz_includes -I${PROJECT_SOURCE_DIR}/src -isystem ${torch_root}/include)
set(fuzz_sources src/checkpoint/manifest.cpp src/checkpoint/safetensors_header.cpp src/checkpoint/digest.cpp src/checkpoint/blocks.cpp
                 src/checkpoint/durable.cpp src/base/mapped_file.cpp src/base/quantities.cpp src/base/box.cpp)

# fuzz_object(<source> <variable>): its object file, compiled by clang++.
function(fuzz_object source variable)
  string(REPLACE / _ name ${source})
  set(object ${CMAKE_CURRENT_BINARY_DIR}/fuzz/${name}.o)
  add_custom_command(OUTPUT ${object} DEPFILE ${object}.d DEPENDS ${PROJECT_SOURCE_DIR}/${source} VERBATIM
    COMMAND ${CMAKE_CXX_COMPILER_LAUNCHER} ${UPCYCLE_CLANGXX} ${fuzz_flags} -fsanitize=fuzzer-no-link ${fuzz_includes} -MD -MF ${object}.d -MT ${object}
            -c ${PROJECT_SOURCE_DIR}/${source} -o ${object}
    COMMENT "Building ${source} to be fuzzed")
  set(${variable} ${object} PARENT_SCOPE)
endfunction()

set(fuzz_objects "")
if(NOT fuzz_problem)
  foreach(source ${fuzz_sources})
    fuzz_object(${source} object)
    list(APPEND fuzz_objects ${object})
  endforeach()
endif()

foreach(reader manifest safetensors)
  set(fuzzer ${CMAKE_CURRENT_BINARY_DIR}/fuzz/fuzz_${reader})
  set(found ${CMAKE_CURRENT_BINARY_DIR}/fuzz/${reader})
  if(fuzz_problem)
    add_test(NAME fuzz.${reader} COMMAND ${CMAKE_COMMAND} -E echo "Skipped: ${fuzz_problem}")
    set_tests_properties(fuzz.${reader} PROPERTIES LABELS fuzz SKIP_REGULAR_EXPRESSION "Skipped: ")
    continue()
  endif()
  fuzz_object(tests/fuzz/fuzz_${reader}.cpp object)
  add_custom_command(OUTPUT ${fuzzer} DEPENDS ${object} ${fuzz_objects} VERBATIM
    COMMAND ${UPCYCLE_CLANGXX} ${fuzz_flags} -fsanitize=fuzzer ${object} ${fuzz_objects} ${torch_lib}/libc10.so ${XXHASH_LIBRARY} -Wl,-rpath,${torch_lib} -o ${fuzzer}
    COMMENT "Linking fuzz_${reader}")
  add_custom_target(fuzz_${reader} ALL DEPENDS ${fuzzer})
  file(MAKE_DIRECTORY ${found})
  # What it finds new goes into the build folder, never into the corpus that is kept.
  add_test(NAME fuzz.${reader} WORKING_DIRECTORY ${CMAKE_CURRENT_BINARY_DIR}/fuzz
    COMMAND ${fuzzer} -max_total_time=30 -timeout=10 -rss_limit_mb=1024 -max_len=100000 -print_final_stats=1 -dict=${CMAKE_CURRENT_LIST_DIR}/json.dict
            ${found} ${CMAKE_CURRENT_LIST_DIR}/corpus/${reader})
  set_tests_properties(fuzz.${reader} PROPERTIES LABELS fuzz TIMEOUT 120)
endforeach()
if(fuzz_problem)
  message(STATUS "No fuzzing: ${fuzz_problem}")
endif()
