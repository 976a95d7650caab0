// main() of the GPU tests: without a device they are skipped, and CTest says so.
#include <ATen/Context.h>
#include <gtest/gtest.h>

#include <cstdio>

int main(int argc, char** argv) {
  testing::InitGoogleTest(&argc, argv);
  if (!at::hasCUDA()) {
    std::puts("no CUDA device here: skipped");
    return 77;
  }
  return RUN_ALL_TESTS();
}
