#include "base/host_memory.hpp"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <limits>
#include <sstream>
#include <string>

namespace upcycle {
namespace {

namespace fs = std::filesystem;
constexpr uint64_t kUnlimited = std::numeric_limits<uint64_t>::max();

// A number in a file; unlimited for a missing file and for "max".
uint64_t number_in(const fs::path& path) {
  std::ifstream file(path);
  uint64_t number = kUnlimited;
  return file >> number ? number : kUnlimited;
}

uint64_t available_in_system(const fs::path& root) {
  std::ifstream file(root / "proc/meminfo");
  for (std::string key, rest; file >> key && std::getline(file, rest);) {
    if (key == "MemAvailable:") return std::stoull(rest) * 1024;
  }
  return kUnlimited;
}

// What the limits of a group and of those around it leave. Page cache that a group has counts as used by it, but is given up first.
uint64_t left_in_group(const fs::path& root, fs::path group, const char* limit, const char* used, const char* cache_key) {
  uint64_t left = kUnlimited;
  for (group = group.relative_path();; group = group.parent_path()) {
    const uint64_t most = number_in(root / group / limit), now = number_in(root / group / used);
    if (most != kUnlimited && now != kUnlimited) {
      uint64_t cache = 0;
      std::ifstream statistics(root / group / "memory.stat");
      for (std::string key, value; statistics >> key >> value;) {
        if (key == cache_key) cache = std::stoull(value);
      }
      left = std::min(left, most - std::min(most, now - std::min(now, cache)));
    }
    if (group.empty()) return left;
  }
}

}  // namespace

uint64_t available_host_memory() { return available_host_memory_below("/"); }

uint64_t available_host_memory_below(const fs::path& root) {
  uint64_t available = available_in_system(root);
  const fs::path trees = root / "sys/fs/cgroup";
  std::ifstream groups(root / "proc/self/cgroup");   // "0::/path" for version 2, "5:cpu,memory:/path" for version 1
  for (std::string line; std::getline(groups, line);) {
    std::istringstream fields(line);
    std::string number, controllers, path;
    std::getline(std::getline(std::getline(fields, number, ':'), controllers, ':'), path);
    if (controllers.empty()) {
      available = std::min(available, left_in_group(trees, path, "memory.max", "memory.current", "inactive_file"));
    } else if (("," + controllers + ",").find(",memory,") != std::string::npos) {
      available = std::min(available, left_in_group(trees / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"));
    }
  }
  return available;
}

}  // namespace upcycle
