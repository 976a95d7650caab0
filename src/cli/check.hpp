#pragma once
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace upcycle {

/// What `check` finds out about one rank, and one node.
struct RankCheck {
  std::string host;
  std::vector<int> cpus;
  std::string device;                    ///< "NVIDIA H200", or the CPU's name
  std::string gpu;                       ///< its UUID; empty on a CPU
};
struct NodeCheck {
  std::string host;
  std::vector<int> ranks;                ///< ascending; the first speaks for the node
  int64_t memory = 0;                    ///< bytes of host memory that are free
  std::optional<double> disk;            ///< GB/s into the run directory, all nodes at once
  std::optional<double> link;            ///< GB/s to the better of its neighbours, each way
};

struct CheckReport {
  std::vector<RankCheck> ranks;
  std::vector<NodeCheck> nodes;          ///< in the order of their first ranks
  std::string slurm;                     ///< "job 17, 8 tasks in this step"; empty outside of Slurm
  std::string layout;                    ///< "tensor 2, data 4"; empty where the run does not divide
  std::string transport;                 ///< what the links were measured by
  struct Pair {
    std::string a, b;
    double speed;                        ///< GB/s, each way
  };
  std::vector<Pair> pairs;
  std::optional<double> all_reduce;      ///< GB/s
  std::string room;                      ///< what the run will write, and what is free
  std::string time;                      ///< what a save takes, and what Slurm gives it
  std::optional<double> seconds_to_save, seconds_left;
  std::vector<std::string> notes;        ///< may be meant so
  std::vector<std::string> problems;     ///< train should not be started
  double seconds = 0;
};

std::string to_text(const CheckReport&);
nlohmann::ordered_json to_json(const CheckReport&);

/// GB/s at which this process writes into `directory`, or the nearest one above it that is there: a file without a name, so that nothing
/// is left of it even if the process is killed; past the page cache where the file system can; at most 256 MB, a tenth of the space that is
/// free, and 3 s; with the time until it is on the disk. Throws UserError naming the directory when that fails.
double disk_speed(const std::filesystem::path& directory);

}  // namespace upcycle
