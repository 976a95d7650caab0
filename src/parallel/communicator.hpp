#pragma once
#include <cstdint>
#include <exception>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/tensor.hpp"

namespace upcycle {

enum class Reduce { sum, max, min };

/// A group of ranks and what moves between them. Knows ranks and bytes, never parameters, experts or graphs.
/// CPU tensors travel by MPI; CUDA tensors by NCCL, or by MPI through pinned host memory, as Mesh::prepare decided.
/// A group of one rank is ordinary: its collectives return at once, with the argument itself as their result.
/// Tensors must be contiguous; results lie on the argument's device. Nothing is recorded for autograd (see regions.hpp).
/// Reductions take float32, float64, bfloat16, float16, int32, int64; bf16 and fp16 are reduced in fp32 and rounded once.
/// By MPI the order of summation is that of the ranks, whatever the timing: the same bits on all ranks and in every run.
/// With NCCL, calls are asynchronous on the current CUDA stream.
/// A fault of MPI or NCCL throws std::runtime_error naming the call; wrong shapes throw std::logic_error.
class Communicator {
 public:
  struct State;     ///< the MPI_Comm and, once made, the ncclComm_t
  Communicator();   ///< the group of this one process; needs no MPI
  explicit Communicator(std::unique_ptr<State>);
  Communicator(Communicator&&) noexcept;
  Communicator& operator=(Communicator&&) noexcept;
  ~Communicator();

  /// **Collective** over MPI_COMM_WORLD: all ranks, in a communicator of their own.
  static Communicator everyone();
  /// **Collective.** Ranks that name the same `colour` (>= 0) form a group, ordered by `key`.
  Communicator split(int colour, int key) const;

  int rank() const noexcept;
  int size() const noexcept;

  /// **Collective.** In place; `x` the same shape and dtype on all ranks.
  void all_reduce(Tensor& x, Reduce = Reduce::sum) const;
  /// **Collective.** Every rank's `x` (same shape), one after another along `dim`.
  Tensor all_gather(const Tensor& x, int64_t dim) const;
  /// **Collective.** The sum over ranks of `x`, cut into size() equal parts along `dim`; this rank's part.
  Tensor reduce_scatter(const Tensor& x, int64_t dim) const;
  /// **Collective.** The same two for a flat `x`, in place and without room of their own: `x` is size() equal parts, and rank r's is
  /// the r-th. Sums every rank's `x` into that part of this rank (its other parts are undefined then).
  void reduce_into_own_part(Tensor& x) const;
  /// **Collective.** Fills the other parts of `x` with their ranks' own.
  void gather_from_own_part(Tensor& x) const;
  /// Neighbouring rows of a tensor, all for one rank of the group or all from it.
  struct Run {
    int peer;
    int64_t rows;
  };
  /// One run for each rank, in their order.
  static std::vector<Run> one_each(std::span<const int64_t> rows);
  /// **Collective.** `x` [rows sent, ...] goes run by run, as `sent` cuts it, to the runs' peers (this rank may be one); the result
  /// [rows received, ...] is made of the runs `received`, in that order. Runs from one rank to another are taken in the order in which
  /// both list them, and must be of as many rows. Empty runs are fine.
  Tensor all_to_all(const Tensor& x, std::span<const Run> sent, std::span<const Run> received) const;
  /// **Collective.** In place, from rank `root`.
  void broadcast(Tensor& x, int root) const;
  void send(const Tensor& x, int to) const;
  void receive(Tensor& x, int from) const;
  /// A tensor on its way to or from another rank of the group.
  struct Message {
    int peer;
    Tensor x;
  };
  /// Sends and receives that go on at the same time: two ranks may each send to the other, and nobody waits in a circle as long as all
  /// make their calls in an order that one clock could dictate. Messages from one rank to another keep the order in which both name them.
  void send_receive(std::span<const Message> sent, std::span<const Message> received) const;

  /// **Collective.** Host-side; small control messages.
  void barrier() const;
  int64_t all_reduce(int64_t value, Reduce) const;
  std::vector<int64_t> all_gather(int64_t value) const;
  std::string broadcast(std::string message, int root) const;
  std::vector<std::string> all_gather(const std::string& message) const;

  /// **Collective.** Runs `action` on every rank; when it throws on some, all throw the same error, that of the lowest such
  /// rank (named unless it is 0), as a UserError or a CommonFault (base/fault.hpp). So nobody is left waiting in a collective.
  template <class Action>
  void together(Action&& action) const {
    std::exception_ptr error;
    try {
      action();
    } catch (...) {
      error = std::current_exception();
    }
    agree(error);
  }

  /// **Collective** over this group. From now on CUDA tensors of `groups`, which lie in it and all of whose ranks name them, in one order,
  /// travel by NCCL, on this rank's current GPU. Groups of one rank make none. Throws std::runtime_error when NCCL is not built in or
  /// refuses; then none has changed.
  void use_nccl_in(std::span<Communicator* const> groups) const;
  /// In this group itself.
  void use_nccl();
  /// Back to MPI through host memory.
  void leave_nccl() noexcept;
  bool has_nccl() const noexcept;

  /// The MPI communicator for code that hands it to a C library: MPI_Comm_f2c(handle) gives it back (so that this header needs
  /// no mpi.h). MPI_COMM_SELF's for the group of one process.
  int mpi_handle() const;

  /// The most bytes that one MPI call moves, the same on all ranks: MPI counts in int, and reductions need that much scratch
  /// (malloc keeps blocks of this size for the next call; larger ones come as fresh pages each time, a third slower).
  static constexpr int64_t kPieceBytes = int64_t{16} << 20;
  /// Lowered by tests, so that small tensors go in many pieces.
  static inline int64_t piece_bytes = kPieceBytes;

 private:
  void agree(std::exception_ptr) const;
  bool by_nccl(const Tensor&) const noexcept;
  std::unique_ptr<State> state_;
};

}  // namespace upcycle
