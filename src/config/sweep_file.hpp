#pragma once
#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <utility>
#include <vector>

namespace upcycle {

/// What arms of a sweep have in common when they are compared.
enum class Match { tokens, flops, time };

/// Keys of the run file with their values: `--set` assignments ("moe.experts", "8"), the value as TOML.
using Settings = std::vector<std::pair<std::string, std::string>>;

/// A sweep as its user describes it: a base run file, and the keys in which its arms differ.
struct SweepFile {
  std::string path;                      ///< where it was read
  std::string base;                      ///< run file that all arms start from
  std::string directory;                 ///< every arm's run is in here
  Match match = Match::tokens;
  bool control = true;                   ///< a dense arm, continued on the same tokens
  std::vector<int64_t> seeds;            ///< every arm once per seed (run.seed); empty: the base's
  bool same_batches = true;              ///< all arms and seeds see the same batches, step by step (data.seed)
  int64_t ranks = 1;                     ///< MPI ranks of an arm
  int64_t at_once = 1;                   ///< arms that run at a time on this machine, which share its GPUs out
  std::vector<std::string> launcher;     ///< started with `-n ranks` where an arm has several
  std::string prepare;                   ///< shell command that makes source.model, run first where that is missing
  int64_t calibration_steps = 12;        ///< match = "time": steps that measure an arm's speed
  double teraflops = 0;                  ///< of all ranks of an arm together, for the hours before any arm has run; 0: not known
  Settings common;                       ///< [set]: for all arms, the control included
  std::vector<Settings> arms;            ///< one each, without seeds, in the file's order
};

/// Reads and expands a sweep file. Throws UserError naming file and line: not TOML, unknown keys with a suggestion, values that a key
/// does not take, lists of different lengths to be zipped, no arm left, two arms of the same settings, keys that the sweep sets itself.
/// The base run file is not read.
SweepFile read_sweep(const std::string& path);
SweepFile parse_sweep(const std::string& toml, const std::string& name);

}  // namespace upcycle
