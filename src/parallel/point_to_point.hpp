#pragma once
#include <cstdint>
#include <span>

/// Bytes between ranks, by MPI, in pieces that its int counts can express. A communicator is named by its Fortran handle
/// (MPI_Comm_c2f), so that no header needs mpi.h.
namespace upcycle::mpi {

/// Throws std::runtime_error naming the call, with MPI's own text, unless `code` is MPI_SUCCESS.
void check(int code, const char* call);

struct Block {
  std::byte* data = nullptr;
  int64_t bytes = 0;
};
/// A block for or from a rank.
struct Peer {
  int rank;
  Block block;
};

/// **Collective.** Sends to_each[r] to rank r and fills from_each[r] from rank r. Each pair of ranks must agree on the size:
/// more or fewer bytes than expected throw on the receiver. A rank's block for itself is copied, unless it is the same memory.
void exchange(int communicator, std::span<const Block> to_each, std::span<const Block> from_each, int64_t piece_bytes);
/// The same with any number of blocks for each rank: the n-th that one sends another is the n-th that the other has from it.
void exchange_runs(int communicator, std::span<const Peer> to, std::span<const Peer> from, int64_t piece_bytes);

/// To and from other ranks, all at the same time; messages between the same two keep their order.
void send_receive(int communicator, std::span<const Peer> to, std::span<const Peer> from, int64_t piece_bytes);

void send(int communicator, Block, int to, int64_t piece_bytes);
void receive(int communicator, Block, int from, int64_t piece_bytes);
/// **Collective.**
void broadcast(int communicator, Block, int root, int64_t piece_bytes);

}  // namespace upcycle::mpi
