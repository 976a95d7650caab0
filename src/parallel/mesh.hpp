#pragma once
#include <c10/core/Device.h>

#include <array>
#include <span>
#include <string>
#include <vector>

#include "parallel/communicator.hpp"
#include "parallel/grid.hpp"

namespace upcycle {

/// The process's part in MPI: initialised (MPI_THREAD_MULTIPLE) by the constructor, finalised by the destructor. One, in main().
/// Faults of MPI throw from then on. When an exception leaves main's work on some ranks only, call abort_all_ranks instead of
/// the destructor, which waits for all.
class MpiSession {
 public:
  /// **Collective.** Throws std::runtime_error when MPI can't serve several threads.
  MpiSession(int* argc, char*** argv);
  ~MpiSession();
  MpiSession(const MpiSession&) = delete;
  MpiSession& operator=(const MpiSession&) = delete;
};

/// Rank and size of MPI_COMM_WORLD; 0 and 1 before MPI is up.
int world_rank() noexcept;
int world_size() noexcept;
/// Rank of this process among those on its host; decides which GPU it takes.
int host_rank() noexcept;
/// Ends all ranks. For faults only.
[[noreturn]] void abort_all_ranks(int exit_code);

/// Throws UserError when `transport` can't serve tensors on `device`, as far as one rank alone can tell.
void check_transport(c10::Device device, Transport transport);

/// The grid with one communicator per axis, of which this rank is a member.
class Mesh {
 public:
  /// **Collective** over MPI_COMM_WORLD, whose size is grid.world().
  explicit Mesh(Grid grid);

  /// **Collective.** Chooses the transport of tensors on `device` and makes all NCCL communicators in one fixed order (making
  /// them at first use can deadlock). `automatic` falls back to MPI, with one line in the log, when NCCL is not built in or
  /// refuses; `nccl` is a UserError then, and on a CPU. Ranks that share a GPU (same host, same UUID) get no NCCL, unless all of
  /// them set NCCL_HOSTID, each its own, which makes NCCL believe in different hosts.
  void prepare(c10::Device device, Transport transport);

  /// **Collective.** Further groups, one for each colour (>= 0): the ranks that name the same as the i-th, in ascending order; by NCCL where
  /// the mesh uses it. All ranks name equally many.
  std::vector<Communicator> groups(std::span<const int> colours) const;

  const Grid& grid() const noexcept { return grid_; }
  const Coordinates& here() const noexcept { return here_; }
  const Communicator& world() const noexcept { return world_; }
  const Communicator& along(Axis axis) const noexcept { return axes_[static_cast<size_t>(axis)]; }
  /// "NCCL 2.28.3", "MPI", "MPI through pinned host memory": what tensors of the prepared device travel by.
  const std::string& transport() const noexcept { return transport_; }

 private:
  void make_nccl(c10::Device device);

  Grid grid_;
  Coordinates here_;
  Communicator world_;
  std::array<Communicator, kAxes> axes_;
  std::string transport_ = "MPI";
};

/// The transports of this build and their versions: "MPI (Open MPI 4.1.4)", "NCCL 2.28.3".
std::vector<std::string> transports_built_in();

}  // namespace upcycle
