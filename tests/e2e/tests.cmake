# PROCESSORS 1, the default: jobs of two ranks, too, keep less than one core busy, for programs start, wait and end most of the time. What keeps
# two busy is started first, by its COST: later nothing would be left to run beside it.

# What starts the program often starts forks of a process that has loaded it: half a second of CPU less each time. The two lie in one folder.
add_library(rank_server MODULE ${CMAKE_CURRENT_LIST_DIR}/rank_server.c)
target_link_libraries(rank_server PRIVATE ${CMAKE_DL_LIBS})
add_executable(as_rank ${CMAKE_CURRENT_LIST_DIR}/as_rank.c)
list(JOIN UPCYCLE_MPIRUN " " mpirun)
set(environment "${UPCYCLE_TEST_ENVIRONMENT};UPCYCLE_RANK_SERVER=$<TARGET_FILE:rank_server>;UPCYCLE_MPIRUN=${mpirun};HF_HUB_OFFLINE=1")

# The Python tools, by themselves.
foreach(tool corpus plots preprocess preprocess_interrupted preprocess_refusals indexed chat make_dense report)
  add_test(NAME e2e.${tool} COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/test_${tool}.py)
  set_tests_properties(e2e.${tool} PROPERTIES LABELS e2e TIMEOUT 300 ENVIRONMENT "${environment}")
endforeach()

# Bad run files, bad command lines, and what plan says.
add_test(NAME e2e.bad_run_files COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/bad_run_files.py $<TARGET_FILE:upcycle> ${PROJECT_SOURCE_DIR})
set_tests_properties(e2e.bad_run_files PROPERTIES LABELS e2e TIMEOUT 300 ENVIRONMENT "${environment}")

# convert and export: bit for bit through both, into transformers, and what they refuse.
add_test(NAME e2e.convert_export COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/convert_export.py $<TARGET_FILE:upcycle>)
set_tests_properties(e2e.convert_export PROPERTIES LABELS e2e TIMEOUT 600 ENVIRONMENT "${environment}")

# inspect, verify and the schema.
add_test(NAME e2e.checkpoint_tools COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/checkpoint_tools.py $<TARGET_FILE:upcycle>)
set_tests_properties(e2e.checkpoint_tools PROPERTIES LABELS e2e TIMEOUT 300 ENVIRONMENT "${environment}")

# Checkpoints that earlier versions of the program wrote.
add_test(NAME e2e.old_checkpoints COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/old_checkpoints.py $<TARGET_FILE:upcycle>)
set_tests_properties(e2e.old_checkpoints PROPERTIES LABELS e2e TIMEOUT 300 ENVIRONMENT "${environment}")

# train: stop and resume bit for bit, other numbers of ranks, every kind of source, out to transformers; all that it refuses; what it does when
# something changed or went wrong; and what it does with data.
foreach(script train train_errors recovery sweep moments grow_more data_modes streaming)
  add_test(NAME e2e.${script} COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/${script}.py $<TARGET_FILE:upcycle>)
  set_tests_properties(e2e.${script} PROPERTIES LABELS e2e TIMEOUT 600 ENVIRONMENT "${environment}")
endforeach()

# A rank that is killed, stopped, or thrown out of its step. The library makes its allocations fail.
add_library(fail_allocations MODULE ${CMAKE_CURRENT_LIST_DIR}/fail_allocations.c)
target_link_libraries(fail_allocations PRIVATE ${CMAKE_DL_LIBS})
add_test(NAME e2e.rank_failure
  COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/rank_failure.py $<TARGET_FILE:upcycle> $<TARGET_FILE:fail_allocations>)
# Ranks that see another run, another program, other files; and a launcher that starts jobs of one rank.
add_test(NAME e2e.agreement COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/agreement.py $<TARGET_FILE:upcycle>)
set_tests_properties(e2e.rank_failure e2e.agreement PROPERTIES LABELS e2e TIMEOUT 600 ENVIRONMENT "${environment}")

# What job scripts have to do with: save-now and stop, watch, check, the lock across hosts, stragglers.
add_test(NAME e2e.cluster COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/cluster.py $<TARGET_FILE:upcycle>)
set_tests_properties(e2e.cluster PROPERTIES LABELS e2e TIMEOUT 600 ENVIRONMENT "${environment}")

# What a run shows of itself: event files, looks at the experts, the summary.
add_test(NAME e2e.seeing COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/seeing.py $<TARGET_FILE:upcycle>)
set_tests_properties(e2e.seeing PROPERTIES LABELS e2e TIMEOUT 300 ENVIRONMENT "${environment}")

# Traces of steps.
add_test(NAME e2e.tracing COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/tracing.py $<TARGET_FILE:upcycle>)
set_tests_properties(e2e.tracing PROPERTIES LABELS e2e TIMEOUT 300 ENVIRONMENT "${environment}")

# Layouts through the executable: 8 ranks from the command line, and the 14B example's 32 ranks at a small width.
add_test(NAME e2e.layouts COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/layouts.py $<TARGET_FILE:upcycle>)
set_tests_properties(e2e.layouts PROPERTIES LABELS e2e TIMEOUT 900 PROCESSORS 2 COST 100 ENVIRONMENT "${environment}")

# What leaves this machine: cmake --install, and tools/bundle on one of another kind.
add_test(NAME e2e.install COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/test_install.py ${CMAKE_COMMAND} ${CMAKE_BINARY_DIR})
set_tests_properties(e2e.install PROPERTIES LABELS e2e TIMEOUT 300 ENVIRONMENT "${environment}")
find_program(PATCHELF patchelf)
if(PATCHELF)
  add_test(NAME e2e.bundle COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/test_bundle.py $<TARGET_FILE:upcycle> ${PROJECT_SOURCE_DIR})
  set_tests_properties(e2e.bundle PROPERTIES LABELS e2e TIMEOUT 300 ENVIRONMENT "${environment}")
endif()

# tools/bench at the smallest size.
add_test(NAME e2e.bench COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/test_bench.py $<TARGET_FILE:upcycle> ${PROJECT_SOURCE_DIR} Others)
add_test(NAME e2e.bench_training COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/test_bench.py $<TARGET_FILE:upcycle> ${PROJECT_SOURCE_DIR} Training)
add_test(NAME e2e.bench_scaling COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/test_bench_scaling.py $<TARGET_FILE:upcycle> $<TARGET_FILE:collectives>
  ${PROJECT_SOURCE_DIR})
add_custom_target(bench_programs ALL)
add_dependencies(bench_programs collectives)
set_tests_properties(e2e.bench e2e.bench_training e2e.bench_scaling PROPERTIES LABELS e2e TIMEOUT 600 PROCESSORS 2 COST 100 ENVIRONMENT "${environment}")

# sample against transformers' generate; evaluate against train's own validation; inspect of token files, and of two checkpoints;
# what verify and train say of damaged ones.
foreach(script sample evaluate inspect_data compare damaged)
  add_test(NAME e2e.${script} COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/${script}.py $<TARGET_FILE:upcycle>)
  set_tests_properties(e2e.${script} PROPERTIES LABELS e2e TIMEOUT 600 ENVIRONMENT "${environment}")
endforeach()

# A save that is killed, whose disk is full or fails, and the order of its system calls: a program that only writes, seen through a library
# before the C library.
add_executable(crash_writer ${CMAKE_CURRENT_LIST_DIR}/crash_writer.cpp)
target_link_libraries(crash_writer PRIVATE upcycle_checkpoint)
target_include_directories(crash_writer PRIVATE ${PROJECT_SOURCE_DIR}/tests)
upcycle_precompiled(crash_writer)
target_link_libraries(crash_writer PRIVATE ${CMAKE_DL_LIBS})
add_library(file_calls MODULE ${CMAKE_CURRENT_LIST_DIR}/file_calls.c)
add_test(NAME e2e.crash
  COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/crash.py $<TARGET_FILE:crash_writer> $<TARGET_FILE:file_calls>)
add_test(NAME e2e.file_order
  COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/file_order.py $<TARGET_FILE:upcycle> $<TARGET_FILE:crash_writer>
    $<TARGET_FILE:file_calls>)
set_tests_properties(e2e.crash e2e.file_order PROPERTIES LABELS e2e TIMEOUT 1200 ENVIRONMENT "${environment}")
