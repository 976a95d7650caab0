#pragma once
#include "parallel/communicator.hpp"
#include "parallel/point_to_point.hpp"

/// Communicator's collectives on tensors in host memory, made of exchanges between all ranks. Tensors are contiguous.
namespace upcycle::mpi {

/// The ranks of a group, as one of them sees them.
struct Ranks {
  int communicator;   ///< MPI_Comm_c2f
  int rank, size;
  int64_t piece_bytes;
};

inline Block block_of(const Tensor& x) { return {static_cast<std::byte*>(x.data_ptr()), static_cast<int64_t>(x.nbytes())}; }

/// **Collective.** Everyone's `own`, of one size, into `into`, one after another.
void gather(const Ranks&, Block own, std::byte* into);
/// **Collective.** In place; `x` of at most piece_bytes. The order of summation is that of the ranks, and one rank decides each bit.
void all_reduce(const Ranks&, const Tensor& x, Reduce);
/// **Collective.** `out`: the sum over ranks of this rank's part of their `parts_P` [size, out's elements], in the ranks' order.
void reduce_scatter(const Ranks&, const Tensor& parts_P, const Tensor& out);

}  // namespace upcycle::mpi
