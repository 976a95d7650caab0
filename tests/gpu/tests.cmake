# tests of this folder

# NCCL against MPI, on several ranks of one GPU; what holders of the same weights do beside the computation; the look at the experts.
if(UPCYCLE_CUDA)
  upcycle_gtest(gpu_nccl SOURCES gpu/nccl_test.cpp support/mpi_main.cpp LINK upcycle_parallel upcycle::torch_cuda GTest::gtest)
  upcycle_gtest(gpu_replicas SOURCES gpu/replicas_test.cpp support/mpi_main.cpp LINK upcycle_train upcycle::torch_cuda GTest::gtest)
  upcycle_gtest(gpu_expert_health SOURCES gpu/expert_health_test.cpp support/mpi_main.cpp LINK upcycle_train upcycle::torch_cuda GTest::gtest)
  foreach(name nccl replicas expert_health)
    add_dependencies(gpu_tests gpu_${name})
    foreach(ranks 1 2 4)
      add_test(NAME gpu.${name}.${ranks} COMMAND ${UPCYCLE_MPIRUN} -np ${ranks} $<TARGET_FILE:gpu_${name}>)
      set_tests_properties(gpu.${name}.${ranks} PROPERTIES LABELS gpu TIMEOUT 300 SKIP_RETURN_CODE 77 RESOURCE_LOCK gpu
        ENVIRONMENT "${UPCYCLE_TEST_ENVIRONMENT}")
    endforeach()
  endforeach()
endif()

# The quickstart's training on the GPU against the CPU; needs what tools/quickstart has made.
if(UPCYCLE_CUDA AND EXISTS ${PROJECT_SOURCE_DIR}/runs/quickstart/hf-dense)
  add_test(NAME gpu.quickstart COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/quickstart_on_gpu.py $<TARGET_FILE:upcycle>
    WORKING_DIRECTORY ${PROJECT_SOURCE_DIR})
  set_tests_properties(gpu.quickstart PROPERTIES LABELS gpu TIMEOUT 900 SKIP_RETURN_CODE 77 RESOURCE_LOCK gpu
    ENVIRONMENT "${UPCYCLE_TEST_ENVIRONMENT}")
endif()

# One process on a GPU.
if(UPCYCLE_CUDA)
  function(gpu_test name library)
    upcycle_gtest(gpu_${name} SOURCES gpu/${name}_test.cpp support/gpu_main.cpp LINK ${library} upcycle::torch_cuda GTest::gtest)
    add_dependencies(gpu_tests gpu_${name})
    add_test(NAME gpu.${name} COMMAND gpu_${name})
    set_tests_properties(gpu.${name} PROPERTIES LABELS gpu TIMEOUT 300 SKIP_RETURN_CODE 77 RESOURCE_LOCK gpu
      ENVIRONMENT "${UPCYCLE_TEST_ENVIRONMENT}")
  endfunction()
  gpu_test(ops upcycle_moe)               # every op against the CPU
  gpu_test(step upcycle_train)            # a step that never makes the host wait
  gpu_test(deterministic upcycle_train)   # steps that repeat bit for bit
  gpu_test(matmul upcycle_ops)            # matrix products and attention by each of their kernels
  gpu_test(attention upcycle_ops)
  gpu_test(norms upcycle_ops)             # norms and rotated heads
  gpu_test(routing upcycle_moe)           # the router: its product, choices, weights and balance losses
  set_tests_properties(gpu.routing PROPERTIES TIMEOUT 600)
  gpu_test(rows upcycle_ops)              # the rows of the mixture: their order, copies and sums, and what is computed of each
  gpu_test(loss upcycle_model)            # the loss with its gradient
  gpu_test(optimizer upcycle_train)
  gpu_test(host_memory upcycle_checkpoint)   # what checkpoints are copied into and read through
endif()

# A rank's failure while the other's GPU waits in NCCL.
if(UPCYCLE_CUDA)
  add_test(NAME gpu.rank_failure COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/rank_failure_on_gpu.py $<TARGET_FILE:upcycle>
    $<TARGET_FILE:fail_allocations>)
  set_tests_properties(gpu.rank_failure PROPERTIES LABELS gpu TIMEOUT 600 SKIP_RETURN_CODE 77 RESOURCE_LOCK gpu
    ENVIRONMENT "${UPCYCLE_TEST_ENVIRONMENT}")
endif()

# Memory against the plan, and two ranks on one GPU.
if(UPCYCLE_CUDA)
  add_test(NAME gpu.plan COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/plan_on_gpu.py $<TARGET_FILE:upcycle>)
  set_tests_properties(gpu.plan PROPERTIES LABELS gpu TIMEOUT 900 SKIP_RETURN_CODE 77 RESOURCE_LOCK gpu
    ENVIRONMENT "${UPCYCLE_TEST_ENVIRONMENT};UPCYCLE_MPIRUN=${mpirun}")
endif()

# The kernels under memcheck. Minutes each: ctest -LE gpu_slow leaves them out.
if(UPCYCLE_CUDA)
  find_program(COMPUTE_SANITIZER compute-sanitizer HINTS ${CUDAToolkit_BIN_DIR} ENV CUDA_HOME PATH_SUFFIXES bin compute-sanitizer)
  if(COMPUTE_SANITIZER)
    foreach(name ops norms rows loss optimizer routing)
      add_test(NAME gpu.sanitizer.${name} COMMAND ${UPCYCLE_PYTHON} ${CMAKE_CURRENT_LIST_DIR}/sanitizer.py ${COMPUTE_SANITIZER} $<TARGET_FILE:gpu_${name}>)
      set_tests_properties(gpu.sanitizer.${name} PROPERTIES LABELS gpu_slow TIMEOUT 3600 SKIP_RETURN_CODE 77 RESOURCE_LOCK gpu
        ENVIRONMENT "${UPCYCLE_TEST_ENVIRONMENT}")
    endforeach()
  else()
    message(STATUS "No compute-sanitizer: no memcheck of the kernels")
  endif()
endif()

# Layouts on one or more GPUs; the numbers of one rank are what the others are held against.
if(UPCYCLE_CUDA)
  upcycle_gtest(gpu_layouts SOURCES gpu/layouts_test.cpp support/mpi_main.cpp LINK upcycle_train upcycle::torch_cuda GTest::gtest)
  target_compile_definitions(gpu_layouts PRIVATE UPCYCLE_REFERENCE_DIR="${CMAKE_BINARY_DIR}/gpu_layouts")
  add_dependencies(gpu_tests gpu_layouts)
  foreach(ranks 1 2 4)
    add_test(NAME gpu.layouts.${ranks} COMMAND ${UPCYCLE_MPIRUN} -np ${ranks} $<TARGET_FILE:gpu_layouts>)
    set_tests_properties(gpu.layouts.${ranks} PROPERTIES LABELS gpu TIMEOUT 600 SKIP_RETURN_CODE 77 RESOURCE_LOCK gpu
      ENVIRONMENT "${UPCYCLE_TEST_ENVIRONMENT}")
  endforeach()
  set_tests_properties(gpu.layouts.1 PROPERTIES FIXTURES_SETUP gpu_layouts)
  set_tests_properties(gpu.layouts.2 gpu.layouts.4 PROPERTIES FIXTURES_REQUIRED gpu_layouts)
endif()

# tools/bench ops and moe-layer at sizes of no account: that they run.
if(UPCYCLE_CUDA)
  add_dependencies(gpu_tests gpu_bench)
  foreach(part ops moe-layer)
    add_test(NAME gpu.bench.${part} COMMAND gpu_bench ${part} --tiny)
    set_tests_properties(gpu.bench.${part} PROPERTIES LABELS gpu TIMEOUT 120 RESOURCE_LOCK gpu ENVIRONMENT "${UPCYCLE_TEST_ENVIRONMENT}")
  endforeach()
  # Every op that tools/bench without can replace is asked for in a step, and replaced. On the CPU, with which that is seen as well.
  add_dependencies(gpu_tests upcycle_without)
  add_test(NAME gpu.bench.without COMMAND ${UPCYCLE_PYTHON} ${PROJECT_SOURCE_DIR}/tools/bench without --device cpu --model tiny --micro-batch 2
    --sequence 32 --steps 1 --warm-up 1 --program $<TARGET_FILE:upcycle_without>)
  set_tests_properties(gpu.bench.without PROPERTIES LABELS gpu TIMEOUT 300 ENVIRONMENT "${UPCYCLE_TEST_ENVIRONMENT}"
    FAIL_REGULAR_EXPRESSION "never asks for")
  # Every layout of two ranks on one GPU, with traces.
  add_dependencies(gpu_tests collectives)
  add_test(NAME gpu.bench.scaling COMMAND ${UPCYCLE_PYTHON} ${PROJECT_SOURCE_DIR}/tools/bench scaling --share-gpu --model tiny --sequence 64
    --long-sequence 128 --micro-batch 2 --micro-batches 4 --steps 2 --sizes 1 --upcycle $<TARGET_FILE:upcycle> --collectives $<TARGET_FILE:collectives>)
  set_tests_properties(gpu.bench.scaling PROPERTIES LABELS gpu TIMEOUT 600 RESOURCE_LOCK gpu ENVIRONMENT "${UPCYCLE_TEST_ENVIRONMENT}"
    SKIP_REGULAR_EXPRESSION "no GPU here")
endif()
