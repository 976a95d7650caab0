#include "parallel/gpu_sharing.hpp"

#include <map>

#include "base/error.hpp"
#include "base/process.hpp"
#include "device/device.hpp"

namespace upcycle {

std::vector<std::string> shared_gpus(const Communicator& world, const std::string& host, c10::Device device) {
  std::string place;
  world.together([&] { place = text("host ", host, " share one GPU (", device::uuid(device), ")"); });
  const std::vector<std::string> places = world.all_gather(place);
  std::map<std::string, std::vector<size_t>> owners;
  for (size_t rank = 0; rank < places.size(); ++rank) owners[places[rank]].push_back(rank);
  std::vector<std::string> lines;
  for (const auto& [where, ranks] : owners) {
    if (ranks.size() < 2) continue;
    std::string names;
    for (size_t i = 0; i < ranks.size(); ++i) names += text(i == 0 ? "" : i + 1 == ranks.size() ? " and " : ", ", ranks[i]);
    lines.push_back(text("ranks ", names, " of ", where));
  }
  return lines;
}

void refuse_shared_gpus(const Communicator& world, c10::Device device) {
  if (!device.is_cuda() || world.size() == 1) return;
  const std::vector<std::string> shared = shared_gpus(world, host_name(), device);
  if (shared.empty()) return;
  std::string lines;
  for (const std::string& line : shared) lines += "\n  " + line;
  fail("there are more ranks than GPUs:", lines, "\nStart as many ranks on a host as this job has GPUs there (CUDA_VISIBLE_DEVICES counts), or ",
       "ask for it with run.share_gpu = true: each rank then needs memory of its own on the GPU, and tensors travel through host memory");
}

}  // namespace upcycle
