# Our model against Hugging Face transformers. The references are made once per run of CTest, in the build tree.
set(golden ${CMAKE_BINARY_DIR}/golden)
add_test(NAME golden.make COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/make_golden.py ${golden})
set_tests_properties(golden.make PROPERTIES LABELS golden TIMEOUT 600 FIXTURES_SETUP golden
  ENVIRONMENT "${UPCYCLE_TEST_ENVIRONMENT};HF_HUB_OFFLINE=1")

# golden_test(<name> [NEEDS_REFERENCES]): tests/golden/<name>_test.cpp, one process that is the whole world to MPI.
function(golden_test name)
  upcycle_gtest(golden_${name} SOURCES golden/${name}_test.cpp support/mpi_main.cpp LINK upcycle_train GTest::gtest)
  target_compile_definitions(golden_${name} PRIVATE UPCYCLE_GOLDEN_DIR="${golden}")
  add_test(NAME golden.${name} COMMAND golden_${name})
  set_tests_properties(golden.${name} PROPERTIES LABELS golden TIMEOUT 300 ENVIRONMENT "${UPCYCLE_TEST_ENVIRONMENT}")
  if(NEEDS_REFERENCES IN_LIST ARGN)
    set_tests_properties(golden.${name} PROPERTIES FIXTURES_REQUIRED golden)
  endif()
endfunction()

golden_test(golden NEEDS_REFERENCES)
golden_test(exactness)

# Exported directories in transformers against our own logits.
upcycle_gtest(golden_logits SOURCES golden/logits.cpp LINK upcycle_train)
add_test(NAME golden.exported COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/exported.py
  $<TARGET_FILE:upcycle> $<TARGET_FILE:golden_logits> ${golden})
set_tests_properties(golden.exported PROPERTIES LABELS golden TIMEOUT 600 FIXTURES_REQUIRED golden
  ENVIRONMENT "${UPCYCLE_TEST_ENVIRONMENT};HF_HUB_OFFLINE=1")
