#include <ATen/Context.h>
#include <gtest/gtest.h>

#include <cstdio>

/// GoogleTest's main for tests on a GPU by one process. Without a device the tests are skipped, and CTest says so.
int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (!at::hasCUDA()) {
    std::puts("no CUDA device here: skipped");
    return 77;
  }
  return RUN_ALL_TESTS();
}
