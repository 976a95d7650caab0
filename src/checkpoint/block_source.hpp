#pragma once
#include <cstddef>
#include <span>
#include <string>
#include <unordered_map>
#include <vector>

#include "checkpoint/write_plan.hpp"
#include "parallel/communicator.hpp"

namespace upcycle {

/// This rank's side of a plan: the bytes of blocks, out of its own pieces and of those that other ranks send.
class BlockSource {
 public:
  /// `plan` and what the pieces view outlive this one.
  BlockSource(const WritePlan& plan, std::span<const Piece> pieces, int rank, int ranks);

  static int64_t bytes(const WritePlan&, const WritePlan::Block&);

  /// Fills `memory` (bytes(block) of host memory) with the parts of `block` that are this rank's. Any thread, where no piece is read
  /// by a function.
  void fill(const WritePlan::Block& block, std::byte* memory) const;

  /// What this rank sends to each rank, for the plan's blocks `round`; undefined where that is nothing.
  std::vector<Tensor> pack(std::span<const size_t> round) const;
  /// **Collective.** Brings all ranks' packed parts to the blocks' writers; what came from each rank.
  std::vector<Tensor> exchange(const Communicator& world, std::span<const size_t> round, const std::vector<Tensor>& packed) const;
  /// Fills `memory` with the parts of `block` that came from others. Blocks of a round in order; `taken`, zeros in the beginning,
  /// are the bytes that have been used of each rank's.
  void unpack(const WritePlan::Block& block, const std::vector<Tensor>& arrived, std::vector<int64_t>& taken, std::byte* memory) const;

 private:
  void copy_own(const WritePlan::Block&, const Box& part, const Tensor& target) const;
  template <class Act>
  void each_travelling(std::span<const size_t> round, Act&& act) const;

  const WritePlan& plan_;
  int rank_;
  size_t ranks_;
  std::vector<Piece> pieces_;
  std::unordered_map<std::string, std::vector<size_t>> of_tensor_;   ///< indices into pieces_
};

}  // namespace upcycle
