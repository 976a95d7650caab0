// Times operations on this machine's GPU, for tools/bench ops and moe-layer: gpu_bench ops|moe-layer [--tiny]. Prints lines of JSON.
// --tiny: sizes that a CPU does at once, on a GPU or a CPU.
#include <cstring>
#include <iostream>

#include "base/error.hpp"
#include "bench.hpp"

int main(int argc, char** argv) {
  using namespace upcycle;
  const std::string part = argc > 1 ? argv[1] : "";
  const bool tiny = argc > 2 && std::strcmp(argv[2], "--tiny") == 0;
  if ((part != "ops" && part != "moe-layer") || argc > 2 + tiny) {
    std::cerr << "gpu_bench: gpu_bench ops|moe-layer [--tiny]\n";
    return 2;
  }
  try {
    if (device::count() == 0 && !tiny) fail("there is no GPU here, or this build has no CUDA");
    bench::Bench bench(device::choose("auto", 0), tiny);
    part == "ops" ? bench::ops(bench) : bench::moe_layer(bench);
  } catch (const std::exception& error) {
    std::cerr << "gpu_bench: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
