#include <iostream>
#include <nlohmann/json.hpp>

#include "base/dtype.hpp"
#include "base/error.hpp"
#include "base/watchdog.hpp"
#include "cli/command.hpp"
#include "config/run_config.hpp"
#include "train/agreement.hpp"
#include "train/hf_export.hpp"

namespace upcycle {

int run_export(const Arguments& arguments) {
  ExportOptions options;                                                          // 1. what is asked for
  if (arguments.dtype) options.dtype = while_doing("--dtype", [&] { return dtype_from_name(*arguments.dtype); });
  if (arguments.max_shard_size) {
    options.max_shard_bytes = while_doing("--max-shard-size", [&] { return bytes_from_text(*arguments.max_shard_size); });
  }
  options.dense = arguments.dense;
  const Communicator world = Communicator::everyone();                            // any number of ranks, each a share of the bytes
  const Watchdog watchdog(world.rank(), gather_processes(world), RunConfig().timeout_seconds());   // 2. nobody waits for the dead
  const std::string& target = arguments.positional.at(1);
  const ExportReport report = export_to_hf(arguments.positional.at(0), target, options, world);    // 3. check everything, then write
  if (world.rank() != 0) return kExitDone;
  if (arguments.json) {
    std::cout << nlohmann::json{{"checkpoint", report.checkpoint.string()}, {"directory", target}, {"architecture", report.architecture},
                                {"dtype", long_name(report.dtype)}, {"tensors", report.tensors}, {"bytes", report.bytes}}.dump(2)
              << std::endl;
  } else {
    log::info(text("exported ", report.checkpoint.string(), " to ", target, ": ", report.architecture, ", ", report.tensors,
                   " tensors in ", long_name(report.dtype), ", ", report.bytes, " bytes"));
  }
  return kExitDone;
}

}  // namespace upcycle
