#include "parallel/mesh.hpp"

#include <mpi.h>

#include <cstdlib>
#include <stdexcept>

#include "base/error.hpp"
#include "base/log.hpp"
#include "base/process.hpp"
#include "parallel/gpu_sharing.hpp"
#include "parallel/nccl.hpp"
#include "parallel/point_to_point.hpp"

namespace upcycle {
namespace {

using mpi::check;

bool mpi_is_up() noexcept {
  int initialized = 0, finalized = 0;
  MPI_Initialized(&initialized);
  MPI_Finalized(&finalized);
  return initialized && !finalized;
}

int& stored_host_rank() noexcept {
  static int rank = 0;
  return rank;
}

}  // namespace

MpiSession::MpiSession(int* argc, char*** argv) {
  int provided = MPI_THREAD_SINGLE;
  check(MPI_Init_thread(argc, argv, MPI_THREAD_MULTIPLE, &provided), "MPI_Init_thread");
  check(MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
  if (provided < MPI_THREAD_MULTIPLE) {
    throw std::runtime_error("this MPI does not offer MPI_THREAD_MULTIPLE, which backward on a GPU's own thread needs");
  }
  MPI_Comm host = MPI_COMM_NULL;
  check(MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host), "MPI_Comm_split_type");
  check(MPI_Comm_rank(host, &stored_host_rank()), "MPI_Comm_rank");
  check(MPI_Comm_free(&host), "MPI_Comm_free");
}

MpiSession::~MpiSession() {
  if (mpi_is_up()) MPI_Finalize();
}

int world_rank() noexcept {
  int rank = 0;
  if (mpi_is_up()) MPI_Comm_rank(MPI_COMM_WORLD, &rank);
  return rank;
}

int world_size() noexcept {
  int size = 1;
  if (mpi_is_up()) MPI_Comm_size(MPI_COMM_WORLD, &size);
  return size;
}

int host_rank() noexcept { return stored_host_rank(); }

void abort_all_ranks(int exit_code) {
  end_within(5, exit_code);  // MPI_Abort may wait for a launcher that has gone
  end_heedless_launcher();
  if (mpi_is_up()) MPI_Abort(MPI_COMM_WORLD, exit_code);
  std::_Exit(exit_code);
}

Mesh::Mesh(Grid grid) : grid_(grid), here_(grid.at(world_rank())) {
  if (grid.world() != world_size()) {
    throw std::logic_error(text("a grid of ", grid.world(), " ranks on ", world_size(), " ranks"));
  }
  if (world_size() == 1) return;
  world_ = Communicator::everyone();
  for (size_t axis = 0; axis < kAxes; ++axis) {
    const std::vector<int> peers = grid.peers(static_cast<Axis>(axis), world_rank());   // in ascending order on every axis
    axes_[axis] = world_.split(peers[0], world_rank());
    if (peers.size() > 1) log::debug(text("rank 0's group of axis ", name(static_cast<Axis>(axis)), " (", peers.size(), " ranks): ", c10::ArrayRef<int>(peers)));
  }
}

void Mesh::make_nccl(c10::Device device) {
  if (!nccl::built_in()) fail("NCCL is not built in");
  // NCCL refuses ranks on one GPU of one host, and tells hosts apart by NCCL_HOSTID where it is set.
  const char* host_id = std::getenv("NCCL_HOSTID");
  const std::vector<std::string> shared = shared_gpus(world_, host_id ? host_id : host_name(), device);
  if (!shared.empty()) fail(shared.front(), ", which NCCL refuses");
  std::vector<Communicator*> all = {&world_};
  for (Communicator& group : axes_) all.push_back(&group);
  world_.use_nccl_in(all);
}

void check_transport(c10::Device device, Transport transport) {
  if (transport != Transport::nccl) return;
  if (device.is_cpu()) {
    fail("run.transport = \"nccl\" moves tensors between GPUs, but this run's device is the CPU; use \"auto\" or \"mpi\"");
  }
  if (!nccl::built_in()) fail("run.transport = \"nccl\", but NCCL is not built in; use \"auto\" or \"mpi\"");
}

void Mesh::prepare(c10::Device device, Transport transport) {
  check_transport(device, transport);
  if (device.is_cpu()) {
    transport_ = "MPI";
    return;
  }
  transport_ = "MPI through pinned host memory";
  if (transport == Transport::mpi) return;
  try {
    make_nccl(device);
    transport_ = text("NCCL ", nccl::version());
  } catch (const std::exception& refusal) {
    if (transport == Transport::nccl) fail("run.transport = \"nccl\": ", refusal.what(), "; use \"auto\" or \"mpi\"");
    log::info(text("tensors travel by ", transport_, ": ", refusal.what()));
  }
}

std::vector<Communicator> Mesh::groups(std::span<const int> colours) const {
  std::vector<Communicator> groups;
  for (const int colour : colours) groups.push_back(world_.split(colour, world_.rank()));
  std::vector<Communicator*> all;
  for (Communicator& group : groups) all.push_back(&group);
  if (world_.has_nccl()) world_.use_nccl_in(all);
  return groups;
}

std::vector<std::string> transports_built_in() {
  std::string library(MPI_MAX_LIBRARY_VERSION_STRING, '\0');
  int length = 0;
  MPI_Get_library_version(library.data(), &length);
  library.resize(static_cast<size_t>(length));
  library = library.substr(0, library.find_first_of(",\n"));  // "Open MPI v4.1.4"
  if (const size_t v = library.find(" v"); v != std::string::npos) library.erase(v + 1, 1);
  std::vector<std::string> transports = {text("MPI (", library, ")")};
  if (nccl::built_in()) transports.push_back(text("NCCL ", nccl::version()));
  return transports;
}

}  // namespace upcycle
