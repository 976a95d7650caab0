#pragma once
#include <vector>

#include "model/buckets.hpp"
#include "model/catalogue.hpp"

namespace upcycle {

/// The ranks of the world that hold the same box of the parameter as `rank` does, in ascending order: those that sum its gradient,
/// of which every backward leaves the part that its own rank saw. One rule for all: dense slices over context x data; norms and
/// routers over the whole stage, whose tensor ranks saw other tokens; key/value heads over the tensor ranks that share them, too;
/// experts over expert_data; a tied embedding over the first and the last stage. Empty where the rank's stage has no such
/// parameter. Pure; takes a look at each rank of the owning stages.
std::vector<int> holders(const ParameterSpec&, const Layout&, int rank);

/// How many they are, the same for every rank that holds any of it. Arithmetic only.
int num_holders(const ParameterSpec&, const Layout&);

/// Which rank leads each rank's group of holders, [world]: the lowest of them. Stages that have other layers' parameters of the same
/// kind are grouped alike; a stage without (those between the ends, for a tied embedding) has groups of one.
using Partition = std::vector<int>;

/// All partitions of the world into holders of the same box that a model has: few, in the catalogue's order, the same on all ranks.
class HolderGroups {
 public:
  HolderGroups(const Architecture&, const Layout&);
  const std::vector<Partition>& partitions() const noexcept { return partitions_; }
  /// Index of the parameter's partition.
  size_t of(const ParameterSpec&) const;
  /// Where `rank` stands in its group of partition `group`.
  Place place(size_t group, int rank) const;

 private:
  std::vector<std::vector<int64_t>> kinds_;   ///< what a partition depends on, each kind once
  std::vector<size_t> partition_of_kind_;
  std::vector<Partition> partitions_;
  Layout layout_;
};

}  // namespace upcycle
