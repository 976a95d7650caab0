#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/quantities.hpp"
#include "cli/check_parts.hpp"
#include "device/device.hpp"
#include "parallel/gpu_sharing.hpp"
#include "parallel/mesh.hpp"
#include "train/layout_check.hpp"
#include "train/memory_plan.hpp"

namespace upcycle {

void refuse_more_tasks_than_gpus(const RunConfig& config, int64_t tasks, int64_t nodes, int64_t gpus) {
  const bool on_gpus = config.run.device == "cuda" || (config.run.device == "auto" && device::cuda_built_in());
  if (!on_gpus || config.run.share_gpu || gpus <= 0 || tasks <= nodes * gpus) return;
  fail("there are more tasks than GPUs: ", tasks, " tasks on ", nodes, nodes == 1 ? " node of " : " nodes of ", gpus, gpus == 1 ? " GPU" : " GPUs",
       nodes == 1 ? "" : " each", ", which Slurm says. Ask for one task a GPU (sbatch --ntasks-per-node=", gpus, "; where no tasks are asked for, ",
       "the batch scripts start as many), or say run.share_gpu = true");
}

void find_devices(Check& check) {
  const RunConfig& config = *check.config;
  CheckReport& report = check.report;
  std::optional<at::Device> device;
  const bool all = check.by_node("waking the GPU", [&] {
    device = device::choose(config.run.device, host_rank());
    check_transport(*device, config.run.transport);
  });
  nlohmann::json mine = {"", ""};
  if (device) mine = {device::name(*device), device->is_cuda() ? device::uuid(*device) : std::string()};
  const std::vector<std::string> told = check.world.all_gather(mine.dump());
  for (size_t rank = 0; rank < told.size(); ++rank) {
    const nlohmann::json one = nlohmann::json::parse(told[rank]);
    report.ranks[rank].device = one[0], report.ranks[rank].gpu = one[1];
  }
  if (!all) return;
  if (std::any_of(report.ranks.begin(), report.ranks.end(), [&](const RankCheck& rank) { return rank.gpu.empty() == device->is_cuda(); })) {
    report.problems.push_back("some ranks have a GPU and some have none: set run.device, or ask for the same on every node");
    return;
  }
  check.device = device;
  try {
    if (!config.run.share_gpu) refuse_shared_gpus(check.world, *device);
  } catch (const UserError& error) {
    report.problems.push_back(error.what());
    check.device.reset();
  }
}

void plan_memory(Check& check) {
  if (!check.setup || !check.device) return;
  const RunConfig& config = *check.config;
  const Architecture& architecture = check.setup->target.architecture;
  const Layout layout = make_layout(architecture, Grid(config.parallel, check.world.size()), config.parallel);
  const RankMemory mine = rank_memory(architecture, config, layout, check.world.rank());
  if (check.device->is_cuda()) {
    check.by_node("asking the GPU for its memory", [&] {
      const int64_t total = device::memory(*check.device).total;
      if (mine.total() > total) fail("its part of the model needs ", gigabytes(mine.total()), ", and its GPU has ", gigabytes(total), ": see upcycle plan");
    });
    return;
  }
  const std::vector<int64_t> each = check.world.all_gather(mine.tensors());
  for (const NodeCheck& node : check.report.nodes) {
    int64_t together = 0;
    for (const int rank : node.ranks) together += each[static_cast<size_t>(rank)];
    if (together > node.memory) {
      check.report.notes.push_back(text("node ", node.host, ": its ranks' parts of the model need ", gigabytes(together), ", and ", gigabytes(node.memory), " are free"));
    }
  }
}

}  // namespace upcycle
