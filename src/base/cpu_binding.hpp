#pragma once
#include <string>
#include <vector>

namespace upcycle {

/// The CPUs that this process may run on (sched_getaffinity), ascending.
std::vector<int> bound_cpus();

/// "0-3,8": ascending numbers in short.
std::string ranges(const std::vector<int>& numbers);

/// The ranks of one host and the CPUs of each.
struct RankCpus {
  int rank;
  std::vector<int> cpus;
};
/// What is odd about the bindings of one host, a line each: ranks that share CPUs although they are bound to different ones, and more ranks
/// on the same CPUs than there are of these. Ranks that all may use the same CPUs, as many as there are ranks or more, are not bound, which
/// is fine. Pure.
std::vector<std::string> odd_bindings(const std::vector<RankCpus>& ranks);

}  // namespace upcycle
