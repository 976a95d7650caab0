#include "parallel/nccl.hpp"

#include <stdexcept>

#ifdef UPCYCLE_CUDA
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <nccl.h>

#include <chrono>
#include <cstring>
#include <functional>
#include <mutex>
#include <numeric>
#include <set>
#include <thread>
#endif

#include "base/error.hpp"

namespace upcycle::nccl {

#ifdef UPCYCLE_CUDA

struct Group {
  ncclComm_t comm = nullptr;
  int size = 0;
};

namespace {

// All of this process's groups, for abort_all.
std::mutex groups_mutex;
std::set<ncclComm_t> live;

/// Whoever takes a communicator out of the set ends it: destroys or aborts it, once.
bool take(ncclComm_t comm) {
  const std::lock_guard lock(groups_mutex);
  return live.erase(comm) > 0;
}

void check(ncclResult_t code, const char* call, ncclComm_t comm = nullptr) {
  if (code == ncclSuccess) return;
  // The other end is gone. The watchdogs of its host can say whose process that was, and end the job: they are given the time to.
  if (code == ncclRemoteError) std::this_thread::sleep_for(std::chrono::seconds(3));
  throw std::runtime_error(text(call, ": ", ncclGetErrorString(code), " (", ncclGetLastError(comm), ")"));
}

ncclDataType_t type_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return ncclFloat32;
    case at::kDouble:
      return ncclFloat64;
    case at::kInt:
      return ncclInt32;
    case at::kLong:
      return ncclInt64;
    case at::kBFloat16:
      return ncclBfloat16;
    case at::kHalf:
      return ncclFloat16;
    default:
      throw std::logic_error(text("NCCL: no reduction of ", c10::toString(x.scalar_type())));
  }
}

ncclRedOp_t operation(Reduce how) {
  switch (how) {
    case Reduce::sum:
      return ncclSum;
    case Reduce::max:
      return ncclMax;
    case Reduce::min:
      return ncclMin;
  }
  throw std::logic_error("NCCL: unknown reduction");
}

bool rounded(const Tensor& x) { return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf; }

// The GPU of `x` made current, and its current stream: everything is enqueued there.
struct On {
  explicit On(const Tensor& x) : guard(x.device()), stream(c10::cuda::getCurrentCUDAStream(x.get_device())) {}
  c10::cuda::CUDAGuard guard;
  cudaStream_t stream;
};

/// Calls that NCCL carries out together.
template <class Calls>
void grouped(ncclComm_t comm, Calls&& calls) {
  check(ncclGroupStart(), "ncclGroupStart");
  try {
    calls();
  } catch (...) {
    ncclGroupEnd();
    throw;
  }
  check(ncclGroupEnd(), "ncclGroupEnd", comm);
}

}  // namespace

void Leave::operator()(Group* group) const noexcept {
  if (group->comm && take(group->comm)) ncclCommDestroy(group->comm);
  delete group;
}

void abort_all() noexcept {
  std::set<ncclComm_t> all;
  {
    const std::lock_guard lock(groups_mutex);
    all.swap(live);
  }
  for (ncclComm_t comm : all) ncclCommAbort(comm);
}

bool built_in() noexcept { return true; }

std::string version() {
  int number = 0;
  check(ncclGetVersion(&number), "ncclGetVersion");
  return text(number / 10000, '.', number % 10000 / 100, '.', number % 100);
}

std::string new_id() {
  ncclUniqueId id;
  check(ncclGetUniqueId(&id), "ncclGetUniqueId");
  return std::string(id.internal, sizeof id.internal);
}

std::vector<Member> join(std::span<const Invitation> invitations) {
  std::vector<Member> members;
  for (const Invitation& invitation : invitations) members.emplace_back(new Group{nullptr, invitation.size});
  grouped(nullptr, [&] {
    for (size_t i = 0; i < members.size(); ++i) {
      ncclUniqueId name;
      std::memcpy(name.internal, invitations[i].id.data(), sizeof name.internal);
      check(ncclCommInitRank(&members[i]->comm, invitations[i].size, name, invitations[i].rank), "ncclCommInitRank");
    }
  });
  const std::lock_guard lock(groups_mutex);
  for (const Member& member : members) live.insert(member->comm);
  return members;
}

void all_reduce(Group& group, Tensor& x, Reduce how) {
  if (how == Reduce::sum && rounded(x)) {
    const int64_t part = (x.numel() + group.size - 1) / group.size, padding = part * group.size - x.numel();
    const Tensor own = reduce_scatter(group, (padding ? at::constant_pad_nd(x.view(-1), {0, padding}) : x).view({group.size, part}));
    x.copy_(all_gather(group, own).view(-1).narrow(0, 0, x.numel()).view(x.sizes()));
    return;
  }
  const On gpu(x);
  check(ncclAllReduce(x.data_ptr(), x.data_ptr(), static_cast<size_t>(x.numel()), type_of(x), operation(how),
                      group.comm, gpu.stream),
        "ncclAllReduce", group.comm);
}

Tensor all_gather(Group& group, const Tensor& x) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.insert(sizes.begin(), group.size);
  const Tensor all = at::empty(sizes, x.options());
  const On gpu(x);
  check(ncclAllGather(x.data_ptr(), all.data_ptr(), x.nbytes(), ncclInt8, group.comm, gpu.stream), "ncclAllGather",
        group.comm);
  return all;
}

Tensor reduce_scatter(Group& group, const Tensor& parts_P) {
  // NCCL itself would round after every addition. Here each part travels once, as it is, and its owner sums: no more bytes than NCCL's.
  if (rounded(parts_P)) {
    const std::vector<Communicator::Run> one_row = Communicator::one_each(std::vector<int64_t>(static_cast<size_t>(group.size), 1));
    const Tensor from_each = at::empty_like(parts_P);
    all_to_all(group, parts_P, one_row, from_each, one_row);
    return from_each.sum(0);   // in fp32
  }
  const Tensor own = at::empty(parts_P.sizes().slice(1), parts_P.options());
  const On gpu(parts_P);
  check(ncclReduceScatter(parts_P.data_ptr(), own.data_ptr(), static_cast<size_t>(own.numel()), type_of(parts_P),
                          ncclSum, group.comm, gpu.stream),
        "ncclReduceScatter", group.comm);
  return own;
}

void reduce_into_own_part(Group& group, Tensor& x, int rank) {
  const int64_t part = x.numel() / group.size;
  const On gpu(x);
  check(ncclReduceScatter(x.data_ptr(), x.narrow(0, rank * part, part).data_ptr(), static_cast<size_t>(part), type_of(x), ncclSum,
                          group.comm, gpu.stream),
        "ncclReduceScatter", group.comm);
}

void gather_from_own_part(Group& group, Tensor& x, int rank) {
  const int64_t part = x.numel() / group.size;
  const On gpu(x);
  check(ncclAllGather(x.narrow(0, rank * part, part).data_ptr(), x.data_ptr(), x.nbytes() / static_cast<size_t>(group.size), ncclInt8,
                      group.comm, gpu.stream),
        "ncclAllGather", group.comm);
}

void all_to_all(Group& group, const Tensor& x, std::span<const Communicator::Run> sent, const Tensor& out,
                std::span<const Communicator::Run> received) {
  const int64_t row = std::accumulate(x.sizes().begin() + 1, x.sizes().end(), x.element_size(), std::multiplies<>());
  const On gpu(x);
  grouped(group.comm, [&] {
    const char* from = static_cast<const char*>(x.data_ptr());
    for (const auto& [peer, rows] : sent) {
      if (rows > 0) check(ncclSend(from, static_cast<size_t>(rows * row), ncclInt8, peer, group.comm, gpu.stream), "ncclSend", group.comm);
      from += rows * row;
    }
    char* into = static_cast<char*>(out.data_ptr());
    for (const auto& [peer, rows] : received) {
      if (rows > 0) check(ncclRecv(into, static_cast<size_t>(rows * row), ncclInt8, peer, group.comm, gpu.stream), "ncclRecv", group.comm);
      into += rows * row;
    }
  });
}

void broadcast(Group& group, Tensor& x, int root) {
  const On gpu(x);
  check(ncclBroadcast(x.data_ptr(), x.data_ptr(), x.nbytes(), ncclInt8, root, group.comm, gpu.stream), "ncclBroadcast",
        group.comm);
}

void send(Group& group, const Tensor& x, int to) {
  const On gpu(x);
  check(ncclSend(x.data_ptr(), x.nbytes(), ncclInt8, to, group.comm, gpu.stream), "ncclSend", group.comm);
}

void receive(Group& group, Tensor& x, int from) {
  const On gpu(x);
  check(ncclRecv(x.data_ptr(), x.nbytes(), ncclInt8, from, group.comm, gpu.stream), "ncclRecv", group.comm);
}

void send_receive(Group& group, std::span<const Communicator::Message> sent, std::span<const Communicator::Message> received) {
  grouped(group.comm, [&] {
    for (const auto& [peer, x] : sent) send(group, x, peer);
    for (auto [peer, x] : received) receive(group, x, peer);
  });
}

#else

struct Group {};

namespace {
[[noreturn]] void refuse() { throw std::runtime_error("NCCL is not built in"); }
}  // namespace

void Leave::operator()(Group* group) const noexcept { delete group; }
void abort_all() noexcept {}
bool built_in() noexcept { return false; }
std::string version() { return {}; }
std::string new_id() { refuse(); }
std::vector<Member> join(std::span<const Invitation>) { refuse(); }
void all_reduce(Group&, Tensor&, Reduce) { refuse(); }
Tensor all_gather(Group&, const Tensor&) { refuse(); }
Tensor reduce_scatter(Group&, const Tensor&) { refuse(); }
void reduce_into_own_part(Group&, Tensor&, int) { refuse(); }
void gather_from_own_part(Group&, Tensor&, int) { refuse(); }
void all_to_all(Group&, const Tensor&, std::span<const Communicator::Run>, const Tensor&, std::span<const Communicator::Run>) { refuse(); }
void broadcast(Group&, Tensor&, int) { refuse(); }
void send(Group&, const Tensor&, int) { refuse(); }
void receive(Group&, Tensor&, int) { refuse(); }
void send_receive(Group&, std::span<const Communicator::Message>, std::span<const Communicator::Message>) { refuse(); }

#endif

}  // namespace upcycle::nccl
