#pragma once
#include <string>
#include <vector>

/// What Slurm says of a job in its environment.
namespace upcycle::slurm {

/// "n[1-2,07],gpu3" -> n1, n2, n07, gpu3. Empty when it is not such a list. Pure.
std::vector<std::string> node_names(const std::string& list);

/// The node of each task, in blocks, as Slurm lays them out by default: "n[1-2]" and "3(x2)" -> n1, n1, n1, n2, n2, n2. Empty when the two do
/// not fit. Pure.
std::vector<std::string> nodes_of_tasks(const std::string& nodes, const std::string& tasks_per_node);

/// The same from the environment, of the step that this process is in, else of its job. Empty outside of Slurm.
std::vector<std::string> nodes_of_tasks();

/// This node as Slurm calls it, else its host name.
std::string node_name();

}  // namespace upcycle::slurm
