#include "moe/dispatcher.hpp"

#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>

#include <vector>

namespace upcycle {
namespace {

// Rows arrive ordered by (sender, expert); the permutation that orders them by (expert, sender).
Tensor by_expert(const std::vector<int64_t>& count_SL, int64_t senders, int64_t local, at::Device device) {
  int64_t rows = 0;
  std::vector<int64_t> begin_SL;
  for (const int64_t count : count_SL) {
    begin_SL.push_back(rows);
    rows += count;
  }
  Tensor permutation = at::empty({rows}, at::kLong);
  int64_t* next = permutation.mutable_data_ptr<int64_t>();
  for (int64_t expert = 0; expert < local; ++expert) {
    for (int64_t sender = 0; sender < senders; ++sender) {
      const int64_t block = sender * local + expert;
      for (int64_t row = 0; row < count_SL[block]; ++row) *next++ = begin_SL[block] + row;
    }
  }
  return permutation.to(device);
}

Tensor inverse_permutation(const Tensor& permutation) { return std::get<1>(permutation.sort()); }

}  // namespace

Dispatcher::Dispatcher(const Communicator& experts, int64_t num_experts)
    : group_(experts), num_local_(num_experts / experts.size()) {}

Arrived Dispatcher::dispatch(const Tensor& x_TD, const Routing& routing) const {
  const int64_t ranks = group_.size();
  Arrived arrived;
  arrived.weight_TK = routing.weight_TK;
  arrived.order = sort_by_expert(routing.expert_TK);
  const Tensor x_ND = spread_rows(x_TD, arrived.order);
  if (ranks == 1) {
    arrived.x_RD = x_ND;
    arrived.end_L = at::cumsum(routing.count_E, 0, at::kInt);
    return arrived;
  }
  // count_SE: how many rows each rank has for each expert. The one place where the host must know: split sizes.
  const Tensor count_SE = group_.all_gather(routing.count_E.unsqueeze(0), 0).cpu();
  const Tensor count_SL = count_SE.narrow(1, group_.rank() * num_local_, num_local_).contiguous();
  const Tensor sent_S = count_SE[group_.rank()].view({ranks, num_local_}).sum(1);
  const Tensor received_S = count_SL.sum(1);
  const int64_t* sent = sent_S.const_data_ptr<int64_t>();
  const int64_t* received = received_S.const_data_ptr<int64_t>();
  arrived.splits = {{sent, sent + ranks}, {received, received + ranks}};
  const Tensor arrival_RD = exchange(group_, x_ND, arrived.splits);
  const int64_t* counts = count_SL.const_data_ptr<int64_t>();
  arrived.by_expert_R = by_expert({counts, counts + count_SL.numel()}, ranks, num_local_, x_TD.device());
  arrived.by_sender_R = inverse_permutation(arrived.by_expert_R);
  arrived.x_RD = permute_rows(arrival_RD, arrived.by_expert_R);
  arrived.end_L = at::cumsum(count_SL.sum(0), 0, at::kInt).to(x_TD.device());
  return arrived;
}

Tensor Dispatcher::combine(const Tensor& y_RD, const Arrived& arrived) const {
  Tensor y_ND = y_RD;
  if (arrived.by_sender_R.defined()) {
    const Splits home{arrived.splits.receive, arrived.splits.send};
    y_ND = exchange(group_, permute_rows(y_RD, arrived.by_sender_R), home);
  }
  return weigh_and_sum(y_ND, arrived.weight_TK, arrived.order);
}

}  // namespace upcycle
