# tests of this folder

# The Python tools, by themselves.
foreach(tool corpus plots)
  add_test(NAME e2e.${tool} COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/test_${tool}.py)
  set_tests_properties(e2e.${tool} PROPERTIES LABELS e2e TIMEOUT 300 ENVIRONMENT "${UPCYCLE_TEST_ENVIRONMENT};HF_HUB_OFFLINE=1")
endforeach()
