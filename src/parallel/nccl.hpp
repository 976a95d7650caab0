#pragma once
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "parallel/communicator.hpp"

/// NCCL on the current CUDA stream. In a build without CUDA these functions exist and throw std::runtime_error.
namespace upcycle::nccl {

/// One rank's ncclComm_t, bound to the GPU that was current when it joined.
struct Group;
struct Leave {
  void operator()(Group*) const noexcept;
};
using Member = std::unique_ptr<Group, Leave>;

bool built_in() noexcept;
/// "2.28.9"; empty when not built in.
std::string version();

/// A name for a new group, made on one rank and told to the others.
std::string new_id();
struct Invitation {
  std::string id;
  int rank, size;
};
/// **Collective** over each group. All at the same time: each takes a third of a second. Throws when NCCL refuses one of them, on all
/// its ranks (two ranks on one GPU, say); none is left then.
std::vector<Member> join(std::span<const Invitation>);

/// Aborts all communicators of this process, from any thread: kernels that wait for a rank that is gone leave the GPU, and nothing
/// waits for the peers any more. The members must not be used afterwards.
void abort_all() noexcept;

/// **Collective** each; `x` as in Communicator, on the group's GPU.
void all_reduce(Group&, Tensor& x, Reduce);
/// [size, x's shape]
Tensor all_gather(Group&, const Tensor& x);
/// `parts_P` [size, ...]: the sum over ranks of row `rank`.
Tensor reduce_scatter(Group&, const Tensor& parts_P);
/// Flat `x` of as many parts as ranks, this rank's the `rank`-th: in place.
void reduce_into_own_part(Group&, Tensor& x, int rank);
void gather_from_own_part(Group&, Tensor& x, int rank);
/// Both cut into runs of rows.
void all_to_all(Group&, const Tensor& x, std::span<const Communicator::Run> sent, const Tensor& out, std::span<const Communicator::Run> received);
void broadcast(Group&, Tensor& x, int root);
void send(Group&, const Tensor& x, int to);
void receive(Group&, Tensor& x, int from);
void send_receive(Group&, std::span<const Communicator::Message> sent, std::span<const Communicator::Message> received);

}  // namespace upcycle::nccl
