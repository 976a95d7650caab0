#include <iostream>
#include <nlohmann/json.hpp>

#include "base/dtype.hpp"
#include "base/error.hpp"
#include "cli/command.hpp"
#include "parallel/mesh.hpp"
#include "train/hf_export.hpp"

namespace upcycle {

int run_export(const Arguments& arguments) {
  ExportOptions options;                                                          // 1. what is asked for
  if (arguments.dtype) options.dtype = while_doing("--dtype", [&] { return dtype_from_name(*arguments.dtype); });
  if (arguments.max_shard_size) {
    options.max_shard_bytes = while_doing("--max-shard-size", [&] { return bytes_from_text(*arguments.max_shard_size); });
  }
  options.dense = arguments.dense;
  const Mesh mesh(Grid({}, world_size()));
  mesh.world().together([&] {                                                     // 2. one rank reads, checks and writes
    if (mesh.world().rank() != 0) return;
    const std::string& target = arguments.positional.at(1);
    const ExportReport report = export_to_hf(arguments.positional.at(0), target, options);
    if (arguments.json) {
      std::cout << nlohmann::json{{"checkpoint", report.checkpoint.string()}, {"directory", target}, {"architecture", report.architecture},
                                  {"dtype", long_name(report.dtype)}, {"tensors", report.tensors}, {"bytes", report.bytes}}.dump(2)
                << std::endl;
    } else {
      log::info(text("exported ", report.checkpoint.string(), " to ", target, ": ", report.architecture, ", ", report.tensors,
                     " tensors in ", long_name(report.dtype), ", ", report.bytes, " bytes"));
    }
  });
  return kExitDone;
}

}  // namespace upcycle
