#include "cli/gpu_slots.hpp"

#include <algorithm>
#include <cstdlib>
#include <sstream>

#include "device/device.hpp"

namespace upcycle {

std::vector<std::string> visible_gpus() {
  std::vector<std::string> gpus;
  if (const char* named = std::getenv("CUDA_VISIBLE_DEVICES")) {
    std::istringstream list(named);
    for (std::string gpu; std::getline(list, gpu, ',');) gpus.push_back(gpu);
  } else {
    for (int gpu = 0; gpu < device::count(); ++gpu) gpus.push_back(std::to_string(gpu));
  }
  return gpus;
}

std::string gpus_of_slot(const std::vector<std::string>& gpus, size_t slots, size_t slot) {
  if (slots < 2 || gpus.size() < 2) return {};
  const size_t share = std::max<size_t>(1, gpus.size() / slots), first = slot * share % gpus.size();
  std::string out;
  for (size_t i = first; i < first + share && i < gpus.size(); ++i) out += (out.empty() ? "" : ",") + gpus[i];
  return out;
}

}  // namespace upcycle
