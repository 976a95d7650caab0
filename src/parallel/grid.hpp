#pragma once
#include <array>
#include <cstdint>
#include <vector>

#include "config/run_config.hpp"

namespace upcycle {

/// The axes of the mesh. Two factorings of the same ranks, per pipeline stage:
///   dense:  rank = tensor + TP * (context + CP * (data + DP * pipeline))
///   expert: rank = expert_tensor + ETP * (expert + EP * (expert_data + EDP * pipeline))
/// so that experts may span the tensor, context and data axes ("parallel folding", Megatron-Core).
/// `replica` is all ranks that hold the same dense slice: context x data, in that order; `sequence` all that share a micro-batch:
/// tensor x context.
enum class Axis { tensor, context, data, pipeline, expert_tensor, expert, expert_data, replica, sequence };
inline constexpr int kAxes = 9;
const char* name(Axis) noexcept;

/// Where a rank stands on every axis.
struct Coordinates {
  std::array<int, kAxes> at{};
  int operator[](Axis axis) const noexcept { return at[static_cast<size_t>(axis)]; }
};

/// The arithmetic of the rank layout: a value, no MPI. Tested at thousands of ranks.
class Grid {
 public:
  /// Throws UserError naming the numbers that do not divide.
  Grid(const ParallelSection&, int world_size);

  int world() const noexcept { return world_; }
  int size(Axis axis) const noexcept { return sizes_[static_cast<size_t>(axis)]; }
  Coordinates at(int rank) const noexcept;
  /// The rank that stands there.
  int rank(const Coordinates&) const noexcept;
  /// The ranks that differ from `rank` along `axis` only, itself included, ordered by their coordinate on it.
  std::vector<int> peers(Axis axis, int rank) const;

 private:
  int world_;
  std::array<int, kAxes> sizes_{};
  std::array<int, kAxes> strides_{};  // coordinate = rank / stride % size
};

}  // namespace upcycle
