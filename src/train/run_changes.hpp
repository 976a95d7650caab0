#pragma once
#include <string>
#include <vector>

#include "config/run_config.hpp"

namespace upcycle {

/// A key in which two runs differ, with both values as JSON.
struct RunChange {
  std::string key;
  std::string there, here;
  std::string why;   ///< what a reader may not see in the values; may be empty
  std::string section() const { return key.substr(0, key.find('.')); }
};
/// "optimizer.lr: 0.0001 there, 0.5 here".
std::string line_of(const RunChange&);

/// The keys that decide what is computed and have other values `here` than `there`, in the run file's order: source, model, recipe,
/// schedule, batch, data, optimizer, balance, seed. What may change freely between a stop and a resume is left out: layout, transport,
/// micro-batches, recomputation, what happens to bad steps that come too often, validation, checkpoints, logging, names and directories.
/// Pure.
std::vector<RunChange> run_changes(const RunConfig& there, const RunConfig& here);

/// Of a run that has done `steps_done` steps: the same, less a train.steps under which each of them would have had the same learning rate
/// to the last bit (a constant or inverse-sqrt schedule, or wsd before its descent): such a run is only made longer, or shorter.
std::vector<RunChange> run_changes(const RunConfig& there, const RunConfig& here, int64_t steps_done);

}  // namespace upcycle
