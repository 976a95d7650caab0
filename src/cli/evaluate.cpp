#include "train/evaluate.hpp"

#include <cmath>
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/log.hpp"
#include "base/watchdog.hpp"
#include "cli/command.hpp"
#include "cli/or_abort.hpp"
#include "device/device.hpp"
#include "parallel/gpu_sharing.hpp"
#include "parallel/mesh.hpp"
#include "train/agreement.hpp"

namespace upcycle {
namespace {

using nlohmann::ordered_json;

bool from_source(const Evaluated& model) { return !model.model.starts_with("step "); }

void print(const Evaluation& evaluation) {
  const Evaluated& first = evaluation.models.front();
  std::printf("%-12s %14s %14s %12s %14s\n", "model", "tokens", "nats/token", "perplexity", text("to ", first.model).c_str());
  for (const Evaluated& model : evaluation.models) {
    std::printf("%-12s %14ld %14.6f %12.3f ", model.model.c_str(), static_cast<long>(evaluation.tokens), model.loss, std::exp(model.loss));
    &model == &first ? std::printf("%14s\n", "") : std::printf("%+14.6f\n", model.loss - first.loss);
  }
  for (const Evaluated& model : evaluation.models) std::printf("%s: %s\n", model.model.c_str(), model.folder.c_str());
  if (from_source(evaluation.models.back())) std::printf("the run has no checkpoint yet\n");
}

ordered_json to_json(const Evaluation& evaluation) {
  ordered_json models = ordered_json::array();
  for (const Evaluated& model : evaluation.models) {
    models.push_back({{"model", model.model}, {"folder", model.folder.string()}, {"loss", model.loss}, {"perplexity", std::exp(model.loss)},
                      {"difference", model.loss - evaluation.models.front().loss}});
  }
  return {{"tokens", evaluation.tokens}, {"models", models}};
}

}  // namespace

int run_evaluate(const Arguments& arguments) {
  std::vector<std::string> set = arguments.set;
  if (arguments.data) set.push_back("data.validation=" + ordered_json{{1.0, *arguments.data}}.dump());
  const Communicator world = Communicator::everyone();
  const RunConfig config = read_agreed_run(world, arguments.positional.at(0), set);   // 1. one run; 2. nobody waits for the dead
  const Watchdog watchdog(world.rank(), gather_processes(world), config.timeout_seconds(), nccl::abort_all);
  at::Device device = at::kCPU;
  world.together([&] {
    device = device::choose(config.run.device, host_rank());
    device::set_tf32(false);
  });
  if (!config.run.share_gpu) refuse_shared_gpus(world, device);
  const int64_t batches = arguments.batches.value_or(config.validate.batches);
  const Evaluation evaluation = or_abort_nccl([&] { return evaluate(config, world, device, batches); });   // 3. one model after the other
  if (world.rank() != 0) return kExitDone;
  if (arguments.json) {
    std::cout << to_json(evaluation).dump(2) << std::endl;
  } else {
    print(evaluation);
  }
  return kExitDone;
}

}  // namespace upcycle
