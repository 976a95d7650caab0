// What moves tensors: by NCCL, or by MPI through the host's memory. Small messages of the host: communicator_control.cpp.
#include "parallel/communicator.hpp"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <mpi.h>

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "base/autograd.hpp"
#include "base/error.hpp"
#include "base/handle.hpp"
#include "parallel/host_collectives.hpp"
#include "parallel/nccl.hpp"
#include "parallel/own_time.hpp"
#include "parallel/point_to_point.hpp"
#include "parallel/reduce.hpp"

namespace upcycle {
namespace {

using mpi::Block;
using mpi::block_of;
using mpi::check;

MPI_Comm no_comm() noexcept { return MPI_COMM_NULL; }
void free_comm(MPI_Comm comm) noexcept {
  int finalized = 0;
  MPI_Finalized(&finalized);
  if (!finalized) MPI_Comm_free(&comm);
}
using Comm = Handle<MPI_Comm, free_comm, no_comm>;

void want(bool holds, const char* call, const Tensor& x, const char* what) {
  if (!holds) throw std::logic_error(text(call, ": ", what, "; got ", c10::toString(x.scalar_type()), " ", x.sizes()));
}
void want_contiguous(const char* call, const Tensor& x) {
  want(x.defined() && x.is_contiguous(), call, x, "the tensor must be contiguous");
}
void want_reducible(const char* call, const Tensor& x) {
  want_contiguous(call, x);
  want(reducible(x.scalar_type()), call, x, "this dtype can't be reduced");
}

// Room on the host for what x holds: page-locked when x is on a GPU, so that the copies run at the bus's speed.
Tensor host_room(const Tensor& like, at::IntArrayRef sizes) {
  return at::empty(sizes, like.options().device(at::kCPU).pinned_memory(like.is_cuda()));
}
Tensor on_host(const Tensor& x) { return x.is_cpu() ? x : host_room(x, x.sizes()).copy_(x); }
Tensor back_to(const Tensor& like, const Tensor& host) { return like.is_cpu() ? host : host.to(like.device()); }

// [size, ...]: x cut into equal parts along dim, one after another in memory.
Tensor parts_along(const Tensor& x, int64_t dim, int64_t size) {
  want(x.dim() > 0 && x.size(dim) % size == 0, "reduce_scatter", x, "the group's size must divide the dim");
  return dim == 0 ? x : at::stack(x.chunk(size, dim));
}

}  // namespace

struct Communicator::State {
  Comm comm;
  int rank = 0;
  int size = 1;
  nccl::Member nccl;

  explicit State(MPI_Comm owned) : comm(owned) {
    if (!comm) return;
    check(MPI_Comm_set_errhandler(owned, MPI_ERRORS_RETURN), "MPI_Comm_set_errhandler");
    check(MPI_Comm_rank(owned, &rank), "MPI_Comm_rank");
    check(MPI_Comm_size(owned, &size), "MPI_Comm_size");
  }
  int handle() const { return MPI_Comm_c2f(comm.get()); }
  mpi::Ranks ranks() const { return {handle(), rank, size, piece_bytes}; }
};

Communicator::Communicator() : state_(std::make_unique<State>(MPI_COMM_NULL)) {}
Communicator::Communicator(std::unique_ptr<State> state) : state_(std::move(state)) {}
Communicator::Communicator(Communicator&&) noexcept = default;
Communicator& Communicator::operator=(Communicator&&) noexcept = default;
Communicator::~Communicator() = default;

Communicator Communicator::everyone() {
  MPI_Comm comm = MPI_COMM_NULL;
  check(MPI_Comm_dup(MPI_COMM_WORLD, &comm), "MPI_Comm_dup");
  return Communicator(std::make_unique<State>(comm));
}

Communicator Communicator::split(int colour, int key) const {
  if (!state_->comm) return {};
  MPI_Comm comm = MPI_COMM_NULL;
  check(MPI_Comm_split(state_->comm.get(), colour, key, &comm), "MPI_Comm_split");
  return Communicator(std::make_unique<State>(comm));
}

int Communicator::rank() const noexcept { return state_->rank; }
int Communicator::size() const noexcept { return state_->size; }
bool Communicator::has_nccl() const noexcept { return state_->nccl != nullptr; }
bool Communicator::by_nccl(const Tensor& x) const noexcept { return has_nccl() && x.is_cuda(); }
int Communicator::mpi_handle() const { return MPI_Comm_c2f(state_->comm ? state_->comm.get() : MPI_COMM_SELF); }

void Communicator::use_nccl() {
  Communicator* const itself = this;
  use_nccl_in({&itself, 1});
}

void Communicator::use_nccl_in(std::span<Communicator* const> groups) const {
  std::vector<Communicator*> joining;
  for (Communicator* group : groups) {
    if (group->size() > 1 && !group->has_nccl()) joining.push_back(group);
  }
  std::vector<nccl::Invitation> invitations;
  together([&] {
    for (const Communicator* group : joining) invitations.push_back({group->rank() == 0 ? nccl::new_id() : std::string(), group->rank(), group->size()});
  });
  for (size_t i = 0; i < joining.size(); ++i) invitations[i].id = joining[i]->broadcast(invitations[i].id, 0);
  std::vector<nccl::Member> members;
  together([&] {
    if (!invitations.empty()) members = nccl::join(invitations);
  });
  for (size_t i = 0; i < joining.size(); ++i) joining[i]->state_->nccl = std::move(members[i]);
}

void Communicator::leave_nccl() noexcept { state_->nccl.reset(); }

void Communicator::all_reduce(Tensor& x, Reduce how) const {
  if (size() == 1) return;
  want_reducible("all_reduce", x);
  const Unrecorded guard;
  const own_time::Call call;
  if (by_nccl(x)) return nccl::all_reduce(*state_->nccl, x, how);
  const Tensor flat = x.view(-1);
  const int64_t step = std::max<int64_t>(1, piece_bytes / x.element_size());
  for (int64_t begin = 0; begin < flat.numel(); begin += step) {
    const Tensor piece = flat.narrow(0, begin, std::min(step, flat.numel() - begin));
    const Tensor host = on_host(piece);
    mpi::all_reduce(state_->ranks(), host, how);
    if (!piece.is_cpu()) piece.copy_(host);
  }
}

Tensor Communicator::all_gather(const Tensor& x, int64_t dim) const {
  if (size() == 1) return x;
  want_contiguous("all_gather", x);
  const Unrecorded guard;
  const own_time::Call call;
  dim = x.dim() == 0 ? 0 : (dim + x.dim()) % x.dim();
  Tensor parts;  // [size, ...]
  if (by_nccl(x)) {
    parts = nccl::all_gather(*state_->nccl, x);
  } else {
    std::vector<int64_t> sizes = x.sizes().vec();
    sizes.insert(sizes.begin(), size());
    const Tensor host = on_host(x), all = host_room(x, sizes);
    mpi::gather(state_->ranks(), block_of(host), block_of(all).data);
    parts = back_to(x, all);
  }
  if (x.dim() == 0) return parts;
  return dim == 0 ? parts.flatten(0, 1) : at::cat(parts.unbind(0), dim);
}

Tensor Communicator::reduce_scatter(const Tensor& x, int64_t dim) const {
  if (size() == 1) return x;
  want_reducible("reduce_scatter", x);
  const Unrecorded guard;
  const own_time::Call call;
  dim = x.dim() == 0 ? 0 : (dim + x.dim()) % x.dim();
  const Tensor parts = parts_along(x, dim, size());
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes[static_cast<size_t>(dim)] /= size();
  if (by_nccl(x)) return nccl::reduce_scatter(*state_->nccl, parts.view({size(), -1})).view(sizes);

  const Tensor host = on_host(parts), out = host_room(x, sizes);
  mpi::reduce_scatter(state_->ranks(), host, out);
  return back_to(x, out);
}

void Communicator::reduce_into_own_part(Tensor& x) const {
  if (size() == 1) return;
  want_reducible("reduce_into_own_part", x);
  want(x.dim() == 1 && x.numel() % size() == 0, "reduce_into_own_part", x, "the tensor must be flat, and the group's size divide it");
  const Unrecorded guard;
  const own_time::Call call;
  if (by_nccl(x)) return nccl::reduce_into_own_part(*state_->nccl, x, rank());
  const int64_t part = x.numel() / size();
  x.narrow(0, rank() * part, part).copy_(reduce_scatter(x, 0));
}

void Communicator::gather_from_own_part(Tensor& x) const {
  if (size() == 1) return;
  want_contiguous("gather_from_own_part", x);
  want(x.dim() == 1 && x.numel() % size() == 0, "gather_from_own_part", x, "the tensor must be flat, and the group's size divide it");
  const Unrecorded guard;
  const own_time::Call call;
  if (by_nccl(x)) return nccl::gather_from_own_part(*state_->nccl, x, rank());
  const int64_t part = x.numel() / size();
  const Tensor own = on_host(x.narrow(0, rank() * part, part)), all = x.is_cpu() ? x : host_room(x, x.sizes());
  mpi::gather(state_->ranks(), block_of(own), block_of(all).data);
  if (!x.is_cpu()) x.copy_(all);
}

std::vector<Communicator::Run> Communicator::one_each(std::span<const int64_t> rows) {
  std::vector<Run> runs;
  for (const int64_t n : rows) runs.push_back({static_cast<int>(runs.size()), n});
  return runs;
}

Tensor Communicator::all_to_all(const Tensor& x, std::span<const Run> sent, std::span<const Run> received) const {
  want_contiguous("all_to_all", x);
  const auto sum = [](std::span<const Run> runs) {
    return std::accumulate(runs.begin(), runs.end(), int64_t{0}, [](int64_t rows, const Run& run) { return rows + run.rows; });
  };
  const auto of_group = [this](const Run& run) { return run.peer >= 0 && run.peer < size() && run.rows >= 0; };
  want(x.dim() > 0 && sum(sent) == x.size(0), "all_to_all", x, "the runs that are sent must be all of the tensor's rows");
  want(std::all_of(sent.begin(), sent.end(), of_group) && std::all_of(received.begin(), received.end(), of_group), "all_to_all", x,
       "a run is of no rank of the group, or of less than no rows");
  if (size() == 1) return x;
  const Unrecorded guard;
  const own_time::Call call;
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes[0] = sum(received);
  if (by_nccl(x)) {
    const Tensor out = at::empty(sizes, x.options());
    nccl::all_to_all(*state_->nccl, x, sent, out, received);
    return out;
  }

  const Tensor host = on_host(x), out = host_room(x, sizes);
  const int64_t row =
      x.element_size() * std::accumulate(sizes.begin() + 1, sizes.end(), int64_t{1}, std::multiplies<>());
  const auto cut = [row](const Tensor& whole, std::span<const Run> runs) {
    std::vector<mpi::Peer> blocks;
    std::byte* at = block_of(whole).data;
    for (const auto& [peer, rows] : runs) {
      blocks.push_back({peer, {at, rows * row}});
      at += rows * row;
    }
    return blocks;
  };
  mpi::exchange_runs(state_->handle(), cut(host, sent), cut(out, received), piece_bytes);
  return back_to(x, out);
}

void Communicator::broadcast(Tensor& x, int root) const {
  if (size() == 1) return;
  want_contiguous("broadcast", x);
  const Unrecorded guard;
  const own_time::Call call;
  if (by_nccl(x)) return nccl::broadcast(*state_->nccl, x, root);
  const Tensor host = on_host(x);
  mpi::broadcast(state_->handle(), block_of(host), root, piece_bytes);
  if (!x.is_cpu() && rank() != root) x.copy_(host);
}

void Communicator::send(const Tensor& x, int to) const {
  want_contiguous("send", x);
  want(to >= 0 && to < size() && to != rank(), "send", x, "no such other rank");
  const Unrecorded guard;
  const own_time::Call call;
  if (by_nccl(x)) return nccl::send(*state_->nccl, x, to);
  mpi::send(state_->handle(), block_of(on_host(x)), to, piece_bytes);
}

void Communicator::receive(Tensor& x, int from) const {
  want_contiguous("receive", x);
  want(from >= 0 && from < size() && from != rank(), "receive", x, "no such other rank");
  const Unrecorded guard;
  const own_time::Call call;
  if (by_nccl(x)) return nccl::receive(*state_->nccl, x, from);
  const Tensor host = x.is_cpu() ? x : host_room(x, x.sizes());
  mpi::receive(state_->handle(), block_of(host), from, piece_bytes);
  if (!x.is_cpu()) x.copy_(host);
}

void Communicator::send_receive(std::span<const Message> sent, std::span<const Message> received) const {
  for (const std::span<const Message> messages : {sent, received}) {
    for (const auto& [peer, x] : messages) {
      want_contiguous("send_receive", x);
      want(peer >= 0 && peer < size() && peer != rank(), "send_receive", x, "no such other rank");
    }
  }
  if (sent.empty() && received.empty()) return;
  const Unrecorded guard;
  const own_time::Call call;
  if (by_nccl(sent.empty() ? received[0].x : sent[0].x)) return nccl::send_receive(*state_->nccl, sent, received);

  std::vector<Tensor> hosts;   // alive until all has moved
  const auto peers = [&](std::span<const Message> messages, const auto& room) {
    std::vector<mpi::Peer> all;
    for (const auto& [peer, x] : messages) all.push_back({peer, block_of(hosts.emplace_back(room(x)))});
    return all;
  };
  const std::vector<mpi::Peer> to = peers(sent, [](const Tensor& x) { return on_host(x); });
  const std::vector<mpi::Peer> from = peers(received, [](const Tensor& x) { return x.is_cpu() ? x : host_room(x, x.sizes()); });
  mpi::send_receive(state_->handle(), to, from, piece_bytes);
  for (size_t i = 0; i < received.size(); ++i) {
    if (!received[i].x.is_cpu()) received[i].x.copy_(hosts[sent.size() + i]);
  }
}

}  // namespace upcycle
