#pragma once
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/tensor.hpp"
#include "config/run_config.hpp"

namespace upcycle {

enum class Reduce { sum, max, min };

/// A group of ranks and what moves between them. Knows ranks and bytes, never parameters, experts or graphs.
/// CPU tensors travel by MPI; CUDA tensors by NCCL, or by MPI through pinned host memory, as [run] transport says.
/// A group of one rank is ordinary: its collectives return at once.
/// bf16 and fp16 are reduced in fp32 and rounded once. All tensor arguments must be contiguous; results are new tensors on
/// the argument's device. With NCCL, calls are asynchronous on the current CUDA stream.
class Communicator {
 public:
  struct State;  ///< the MPI_Comm and, once made, the ncclComm_t
  Communicator();                       ///< the group of this one process
  explicit Communicator(std::unique_ptr<State>);
  Communicator(Communicator&&) noexcept;
  Communicator& operator=(Communicator&&) noexcept;
  ~Communicator();

  int rank() const noexcept;
  int size() const noexcept;

  /// **Collective.** In place; `x` the same shape and dtype on all ranks.
  void all_reduce(Tensor& x, Reduce = Reduce::sum) const;
  /// **Collective.** Every rank's `x` (same shape), one after another along `dim`.
  Tensor all_gather(const Tensor& x, int64_t dim) const;
  /// **Collective.** The sum over ranks of `x`, cut into size() equal parts along `dim`; this rank's part.
  Tensor reduce_scatter(const Tensor& x, int64_t dim) const;
  /// **Collective.** `x` [sum(send_rows), ...]: the first send_rows[0] rows go to rank 0, ...; the result [sum(receive_rows), ...]
  /// is ordered by sender. Zero rows are fine.
  Tensor all_to_all(const Tensor& x, std::span<const int64_t> send_rows, std::span<const int64_t> receive_rows) const;
  /// **Collective.** In place, from rank `root`.
  void broadcast(Tensor& x, int root) const;
  void send(const Tensor& x, int to) const;
  void receive(Tensor& x, int from) const;

  /// **Collective.** Host-side; small control messages.
  void barrier() const;
  int64_t all_reduce(int64_t value, Reduce) const;
  std::vector<int64_t> all_gather(int64_t value) const;
  std::string broadcast(std::string message, int root) const;
  std::vector<std::string> all_gather(const std::string& message) const;

  /// **Collective.** Runs `action` on every rank; when it throws on some, all throw the same error, that of the lowest such
  /// rank, with its kind (UserError or not) kept. So nobody is left waiting in a collective.
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

  State& state() const noexcept { return *state_; }

 private:
  void agree(std::exception_ptr) const;
  std::unique_ptr<State> state_;
};

}  // namespace upcycle
