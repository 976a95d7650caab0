# tests of this folder
ranks_test(communicator RANKS 1 2 4)
ranks_test(regions RANKS 1 2 4 LINK base)
ranks_test(mesh RANKS 1 2 4)
ranks_test(verdict RANKS 1 3)

# What tests/support/mpi_main.cpp does when something goes wrong on one rank only: it must be seen, and must not hang.
function(verdict_test case expected)
  add_test(NAME ranks.verdict.${case} COMMAND ${UPCYCLE_MPIRUN} -np 3 $<TARGET_FILE:ranks_verdict>
           --gtest_also_run_disabled_tests --gtest_filter=Verdict.DISABLED_${case} --gtest_color=no)
  set_tests_properties(ranks.verdict.${case} PROPERTIES LABELS ranks TIMEOUT 60 PROCESSORS 2
    PASS_REGULAR_EXPRESSION "${expected}" FAIL_REGULAR_EXPRESSION "PASSED  . 1 test"
    ENVIRONMENT "OMP_NUM_THREADS=1;OMPI_ALLOW_RUN_AS_ROOT=1;OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1")
endfunction()
verdict_test(LastRankFails "failed on rank 2.*1 FAILED TEST")
verdict_test(LastRankStops "rank 2. fatal failure")
verdict_test(LastRankThrows "rank 2. exception: out of paper")
verdict_test(AllSkip "exit code: *77|Exit code: *77")
ranks_test(snapshot RANKS 1 2 4 LINK train)
ranks_test(saver RANKS 1 2 4 LINK train)

# What 1, 2, 4 and 8 ranks have written is read by the larger numbers, and then by the smaller ones once more.
ranks_test(reshard RANKS 1 2 4 8 LINK train)
target_compile_definitions(ranks_reshard PRIVATE UPCYCLE_RESHARD_DIR="${CMAKE_BINARY_DIR}/reshard")
set_tests_properties(ranks.reshard.8 PROPERTIES PROCESSORS 2)
foreach(ranks 1 2 4)
  add_test(NAME ranks.reshard.again.${ranks} COMMAND ${UPCYCLE_MPIRUN} -np ${ranks} $<TARGET_FILE:ranks_reshard>)
  set_tests_properties(ranks.reshard.again.${ranks} PROPERTIES LABELS ranks TIMEOUT 300 PROCESSORS ${ranks} FIXTURES_REQUIRED reshard8
    ENVIRONMENT "${UPCYCLE_TEST_ENVIRONMENT};UPCYCLE_RESHARD_AGAIN=1")
endforeach()
# What an earlier build has left may be another state than this one's.
add_test(NAME ranks.reshard.clean COMMAND ${CMAKE_COMMAND} -E rm -rf ${CMAKE_BINARY_DIR}/reshard)
set_tests_properties(ranks.reshard.clean PROPERTIES LABELS ranks FIXTURES_SETUP reshard0)
set_tests_properties(ranks.reshard.1 PROPERTIES FIXTURES_SETUP reshard1 FIXTURES_REQUIRED reshard0)
set_tests_properties(ranks.reshard.2 PROPERTIES FIXTURES_SETUP reshard2 FIXTURES_REQUIRED reshard1)
set_tests_properties(ranks.reshard.4 PROPERTIES FIXTURES_SETUP reshard4 FIXTURES_REQUIRED reshard2)
set_tests_properties(ranks.reshard.8 PROPERTIES FIXTURES_SETUP reshard8 FIXTURES_REQUIRED reshard4)
ranks_test(replicas RANKS 1 2 4 LINK train)
ranks_test(checkpoint RANKS 1 2 4 LINK checkpoint)
target_compile_definitions(ranks_checkpoint PRIVATE UPCYCLE_PYTHON="${UPCYCLE_PYTHON}")
ranks_test(shared_safetensors RANKS 1 2 4 LINK checkpoint)
ranks_test(dispatcher RANKS 1 2 4 LINK moe)
ranks_test(recompute RANKS 2 4 LINK model)
ranks_test(vocabulary RANKS 1 2 4 LINK model)
ranks_test(balance RANKS 1 2 4 LINK train)
ranks_test(grow_memory RANKS 4 LINK train)
ranks_test(stream_memory RANKS 2 LINK train)
ranks_test(expert_health RANKS 1 2 4 LINK train)

# The numbers of one rank are what the others are held against.
ranks_test(layout_invariance RANKS 1 2 4 LINK train)
target_compile_definitions(ranks_layout_invariance PRIVATE UPCYCLE_REFERENCE_DIR="${CMAKE_BINARY_DIR}/layout_invariance")
set_tests_properties(ranks.layout_invariance.1 PROPERTIES FIXTURES_SETUP layout_reference)
set_tests_properties(ranks.layout_invariance.2 ranks.layout_invariance.4 PROPERTIES FIXTURES_REQUIRED layout_reference)

ranks_test(pipeline RANKS 1 2 4 LINK train)
target_compile_definitions(ranks_pipeline PRIVATE UPCYCLE_REFERENCE_DIR="${CMAKE_BINARY_DIR}/pipeline")
set_tests_properties(ranks.pipeline.1 PROPERTIES FIXTURES_SETUP pipeline_reference)
set_tests_properties(ranks.pipeline.2 ranks.pipeline.4 PROPERTIES FIXTURES_REQUIRED pipeline_reference)

ranks_test(context RANKS 1 2 4 LINK train)
target_compile_definitions(ranks_context PRIVATE UPCYCLE_REFERENCE_DIR="${CMAKE_BINARY_DIR}/context")
set_tests_properties(ranks.context.1 PROPERTIES FIXTURES_SETUP context_reference)
set_tests_properties(ranks.context.2 ranks.context.4 PROPERTIES FIXTURES_REQUIRED context_reference)

ranks_test(masks RANKS 1 2 LINK train)

# Every layout; the numbers of one rank are what the others are held against.
ranks_test(layouts RANKS 1 2 4 8 LINK train)
target_compile_definitions(ranks_layouts PRIVATE UPCYCLE_REFERENCE_DIR="${CMAKE_BINARY_DIR}/layouts")
set_tests_properties(ranks.layouts.1 PROPERTIES FIXTURES_SETUP layouts_reference)
set_tests_properties(ranks.layouts.2 ranks.layouts.4 ranks.layouts.8 PROPERTIES FIXTURES_REQUIRED layouts_reference PROCESSORS 2 TIMEOUT 600)
if(DEFINED ENV{UPCYCLE_ALL_LAYOUTS})
  set_tests_properties(ranks.layouts.2 ranks.layouts.4 ranks.layouts.8 PROPERTIES TIMEOUT 3600)
endif()

# Text from a model whose experts are spread; what one rank says is what the others are held against.
ranks_test(generate RANKS 1 2 4 LINK train)
target_compile_definitions(ranks_generate PRIVATE UPCYCLE_REFERENCE_DIR="${CMAKE_BINARY_DIR}/generate")
set_tests_properties(ranks.generate.1 PROPERTIES FIXTURES_SETUP generate_reference)
set_tests_properties(ranks.generate.2 ranks.generate.4 PROPERTIES FIXTURES_REQUIRED generate_reference)
