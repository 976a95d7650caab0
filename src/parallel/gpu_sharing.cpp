#include "parallel/gpu_sharing.hpp"

#include <map>

#include "base/error.hpp"
#include "base/lines.hpp"
#include "base/process.hpp"
#include "device/device.hpp"

namespace upcycle {

std::vector<std::string> shared_gpus(const Communicator& world, const std::string& host, c10::Device device) {
  std::string place;
  world.together([&] { place = text(host, " ", device::uuid(device)); });
  return shared_gpus(world.all_gather(place));
}

std::vector<std::string> shared_gpus(const std::vector<std::string>& places) {
  std::map<std::string, std::vector<std::string>> owners;
  for (size_t rank = 0; rank < places.size(); ++rank) owners[places[rank]].push_back(std::to_string(rank));
  std::vector<std::string> lines;
  for (const auto& [where, ranks] : owners) {
    if (ranks.size() < 2) continue;
    const size_t gap = where.rfind(' ');
    lines.push_back(text("ranks ", in_a_row(ranks), " of host ", where.substr(0, gap), " share one GPU (", where.substr(gap + 1), ")"));
  }
  return lines;
}

void refuse_shared_gpus(const Communicator& world, c10::Device device) {
  if (!device.is_cuda() || world.size() == 1) return;
  refuse_shared_gpus(shared_gpus(world, host_name(), device));
}

void refuse_shared_gpus(const std::vector<std::string>& shared) {
  if (shared.empty()) return;
  fail("there are more ranks than GPUs:", listed(shared), "\nStart as many ranks on a host as this job has GPUs there (CUDA_VISIBLE_DEVICES counts), or ",
       "ask for it with run.share_gpu = true: each rank then needs memory of its own on the GPU, and tensors travel through host memory");
}

}  // namespace upcycle
