#include "parallel/communicator.hpp"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/stack.h>
#include <mpi.h>

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>

#include "base/autograd.hpp"
#include "base/error.hpp"
#include "base/fault.hpp"
#include "base/handle.hpp"
#include "parallel/nccl.hpp"
#include "parallel/own_time.hpp"
#include "parallel/point_to_point.hpp"
#include "parallel/reduce.hpp"

namespace upcycle {
namespace {

using mpi::Block;
using mpi::check;

// Below this many bytes (over all ranks) an all-reduce is one exchange of everything instead of two of parts.
constexpr int64_t kSmallBytes = 64 << 10;

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

std::byte* bytes_of(const Tensor& x) { return static_cast<std::byte*>(x.data_ptr()); }
Block block_of(const Tensor& x) { return {bytes_of(x), static_cast<int64_t>(x.nbytes())}; }

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

  void exchange(const std::vector<Block>& to_each, const std::vector<Block>& from_each) const {
    mpi::exchange(handle(), to_each, from_each, piece_bytes);
  }
  /// Everyone's `own` into `into`, one after another.
  void gather(Block own, std::byte* into) const {
    std::vector<Block> from_each;
    for (int r = 0; r < size; ++r) from_each.push_back({into + r * own.bytes, own.bytes});
    exchange(std::vector<Block>(static_cast<size_t>(size), own), from_each);
  }
  /// Receives size() blocks of out's bytes and folds them into `out` in the ranks' order; to_each[r] goes to rank r.
  void reduce_from_each(const std::vector<Block>& to_each, Block out, at::ScalarType dtype, Reduce how) const {
    const auto scratch = std::make_unique_for_overwrite<std::byte[]>(static_cast<size_t>(size * out.bytes));
    std::vector<Block> from_each;
    std::vector<const std::byte*> parts;
    for (int r = 0; r < size; ++r) {
      from_each.push_back({scratch.get() + r * out.bytes, out.bytes});
      parts.push_back(from_each.back().data);
    }
    exchange(to_each, from_each);
    reduce_in_order(parts, out.data, out.bytes / static_cast<int64_t>(c10::elementSize(dtype)), dtype, how);
  }
  /// `x` on the host, at most piece_bytes.
  void all_reduce(const Tensor& x, Reduce how) const {
    const Block all = block_of(x);
    if (all.bytes * size <= kSmallBytes) {
      return reduce_from_each(std::vector<Block>(static_cast<size_t>(size), all), all, x.scalar_type(), how);
    }
    // Each rank reduces one part and hands it to all others: every byte is sent twice, and one rank decides each bit.
    std::vector<Block> parts;
    for (int64_t r = 0; r < size; ++r) {
      const int64_t begin = x.numel() * r / size * x.element_size(),
                    end = x.numel() * (r + 1) / size * x.element_size();
      parts.push_back({all.data + begin, end - begin});
    }
    const Block own = parts[static_cast<size_t>(rank)];
    reduce_from_each(parts, own, x.scalar_type(), how);
    exchange(std::vector<Block>(static_cast<size_t>(size), own), parts);
  }
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
  if (size() == 1 || has_nccl()) return;
  std::string id;
  together([&] {
    if (rank() == 0) id = nccl::new_id();
  });
  id = broadcast(id, 0);
  together([&] { state_->nccl = nccl::join(id, rank(), size()); });
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
    state_->all_reduce(host, how);
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
    state_->gather(block_of(host), bytes_of(all));
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
  const int64_t part = static_cast<int64_t>(out.nbytes());
  const int64_t step = std::max<int64_t>(1, piece_bytes / x.element_size()) * x.element_size();
  for (int64_t begin = 0; begin < part; begin += step) {
    const int64_t bytes = std::min(step, part - begin);
    std::vector<Block> to_each;
    for (int r = 0; r < size(); ++r) to_each.push_back({bytes_of(host) + r * part + begin, bytes});
    state_->reduce_from_each(to_each, {bytes_of(out) + begin, bytes}, x.scalar_type(), Reduce::sum);
  }
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
  state_->gather(block_of(own), bytes_of(all));
  if (!x.is_cpu()) x.copy_(all);
}

Tensor Communicator::all_to_all(const Tensor& x, std::span<const int64_t> send_rows,
                                std::span<const int64_t> receive_rows) const {
  want_contiguous("all_to_all", x);
  const auto sum = [](std::span<const int64_t> rows) { return std::accumulate(rows.begin(), rows.end(), int64_t{0}); };
  const size_t ranks = static_cast<size_t>(size());
  want(x.dim() > 0 && send_rows.size() == ranks && receive_rows.size() == ranks && sum(send_rows) == x.size(0),
       "all_to_all", x, "needs one number of rows per rank, and together those of the tensor");
  if (size() == 1) return x;
  const Unrecorded guard;
  const own_time::Call call;
  if (by_nccl(x)) return nccl::all_to_all(*state_->nccl, x, send_rows, receive_rows);

  std::vector<int64_t> sizes = x.sizes().vec();
  sizes[0] = sum(receive_rows);
  const Tensor host = on_host(x), out = host_room(x, sizes);
  const int64_t row =
      x.element_size() * std::accumulate(sizes.begin() + 1, sizes.end(), int64_t{1}, std::multiplies<>());
  const auto cut = [row](const Tensor& whole, std::span<const int64_t> rows) {
    std::vector<Block> blocks;
    std::byte* at = bytes_of(whole);
    for (const int64_t n : rows) {
      blocks.push_back({at, n * row});
      at += n * row;
    }
    return blocks;
  };
  state_->exchange(cut(host, send_rows), cut(out, receive_rows));
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

void Communicator::barrier() const {
  if (size() == 1) return;
  const own_time::Call call;
  check(MPI_Barrier(state_->comm.get()), "MPI_Barrier");
}

int64_t Communicator::all_reduce(int64_t value, Reduce how) const {
  if (size() == 1) return value;
  const own_time::Call call;
  const MPI_Op op = how == Reduce::sum ? MPI_SUM : how == Reduce::max ? MPI_MAX : MPI_MIN;
  check(MPI_Allreduce(MPI_IN_PLACE, &value, 1, MPI_INT64_T, op, state_->comm.get()), "MPI_Allreduce");
  return value;
}

std::vector<int64_t> Communicator::all_gather(int64_t value) const {
  std::vector<int64_t> values(static_cast<size_t>(size()), value);
  if (size() == 1) return values;
  const own_time::Call call;
  check(MPI_Allgather(&value, 1, MPI_INT64_T, values.data(), 1, MPI_INT64_T, state_->comm.get()), "MPI_Allgather");
  return values;
}

std::string Communicator::broadcast(std::string message, int root) const {
  if (size() == 1) return message;
  const own_time::Call call;
  int64_t length = static_cast<int64_t>(message.size());
  mpi::broadcast(state_->handle(), {reinterpret_cast<std::byte*>(&length), sizeof length}, root, piece_bytes);
  message.resize(static_cast<size_t>(length));
  mpi::broadcast(state_->handle(), {reinterpret_cast<std::byte*>(message.data()), length}, root, piece_bytes);
  return message;
}

std::vector<std::string> Communicator::all_gather(const std::string& message) const {
  std::vector<std::string> messages(static_cast<size_t>(size()), message);
  if (size() == 1) return messages;
  const own_time::Call call;
  const std::vector<int64_t> lengths = all_gather(static_cast<int64_t>(message.size()));
  std::vector<Block> from_each;
  for (size_t r = 0; r < messages.size(); ++r) {
    messages[r].resize(static_cast<size_t>(lengths[r]));
    from_each.push_back({reinterpret_cast<std::byte*>(messages[r].data()), lengths[r]});
  }
  std::string own = message;
  const Block mine{reinterpret_cast<std::byte*>(own.data()), static_cast<int64_t>(own.size())};
  state_->exchange(std::vector<Block>(messages.size(), mine), from_each);
  return messages;
}

void Communicator::agree(std::exception_ptr error) const {
  if (size() == 1) {
    if (error) std::rethrow_exception(error);
    return;
  }
  constexpr int64_t kNobody = std::numeric_limits<int64_t>::max();
  const int64_t lowest = all_reduce(error ? rank() : kNobody, Reduce::min);
  if (lowest == kNobody) return;
  std::string message;  // the first letter says the kind
  if (error) {
    try {
      std::rethrow_exception(error);
    } catch (const UserError& mistake) {
      message = text("u", mistake.what());
    } catch (const std::exception& fault) {
      message = text("f", fault.what());
    } catch (...) {
      message = "fan exception of an unknown type";
    }
  }
  message = broadcast(message, static_cast<int>(lowest));
  const std::string what = (lowest > 0 ? text("rank ", lowest, ": ") : "") + message.substr(1);
  if (message[0] == 'u') throw UserError(what);
  throw CommonFault(rank() == lowest, what);
}

}  // namespace upcycle
