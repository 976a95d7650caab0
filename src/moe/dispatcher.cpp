#include "moe/dispatcher.hpp"

#include <ATen/ops/cumsum.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "base/autograd.hpp"
#include "base/trace_range.hpp"
#include "device/device.hpp"

namespace upcycle {
namespace {

std::vector<int64_t> numbers(const Tensor& host) {
  const int64_t* first = host.const_data_ptr<int64_t>();
  return {first, first + host.numel()};
}

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
  return device::send(permutation, device);
}

// Rows leave sorted by expert, so those for rank r's expert l are one run. They arrive as one run of each sender for each local expert:
// sorted by expert already, or, where other ranks' rows are still to come in between (`by_sender`), as each sender has them.
Splits runs(const Tensor& sent_E, const Tensor& count_SL, bool by_sender) {
  const int64_t senders = count_SL.size(0), local = count_SL.size(1);
  const int64_t *sent = sent_E.const_data_ptr<int64_t>(), *arriving = count_SL.const_data_ptr<int64_t>();
  Splits splits;
  for (int64_t expert = 0; expert < sent_E.numel(); ++expert) splits.send.push_back({static_cast<int>(expert / local), sent[expert]});
  for (int64_t i = 0; i < senders * local; ++i) {
    const int64_t sender = by_sender ? i / local : i % senders, expert = by_sender ? i % local : i / senders;
    splits.receive.push_back({static_cast<int>(sender), arriving[sender * local + expert]});
  }
  return splits;
}

// With one rank there are none.
Splits splits_of(const Route& route) { return route.splits.valid() ? route.splits.get() : Splits(); }

}  // namespace

// A row counts 2 bytes on its way (bf16), and 4 where partial sums come home in fp32.
//   all-to-all: T*K rows, of which (S-1)/S cross, there and back; the P parts of a width gather and reduce all that arrived.
//   all-gather: the T rows of all other ranks there; their partial sums back.
Dispatch chosen_dispatch(Dispatch wish, int64_t top_k, int64_t ranks, int64_t peers) {
  if (wish != Dispatch::automatic) return wish;
  const double k = static_cast<double>(top_k), s = static_cast<double>(ranks), p = static_cast<double>(peers);
  const double all_to_all = (2 + 2) * k * ((s - 1) / s + p - 1), all_gather = (2 + 4) * (s * p - 1);
  return all_gather < all_to_all ? Dispatch::all_gather : Dispatch::all_to_all;
}

Dispatcher::Dispatcher(const Communicator& experts, const Communicator& expert_tensor, DispatcherSettings settings)
    : experts_(experts),
      expert_tensor_(expert_tensor),
      num_experts_(settings.experts),
      num_local_(settings.experts / experts.size()),
      how_(chosen_dispatch(settings.how, settings.top_k, experts.size(), expert_tensor.size())),
      pad_(settings.pad) {}

// A token chooses an expert once, so T tokens fill T slots at most.
int64_t Dispatcher::slots(const Routing& routing) const {
  return pad_ && routing.capacity > 0 ? std::min(routing.capacity, routing.expert_TK.size(0)) : 0;
}

Route Dispatcher::plan(const Routing& routing) const {
  const TraceRange range("plan");
  const Unrecorded guard;
  return how_ == Dispatch::all_gather ? plan_all_gather(routing) : plan_all_to_all(routing);
}

Route Dispatcher::plan_all_to_all(const Routing& routing) const {
  const int64_t ranks = experts_.size(), peers = expert_tensor_.size(), slots = this->slots(routing);
  const at::Device device = routing.expert_TK.device();
  Route route;
  if (ranks * peers == 1 && routing.capacity == 0) {
    route.order = sort_by_expert(routing.expert_TK, num_experts_);
    route.end_L = route.order.end_E;
    return route;
  }
  // [S, E]: how many rows each rank has for each expert. The one place where the host must know: split sizes. What the device can do
  // without the host is asked of it first, so that it has work while the host waits.
  const Tensor counts = slots > 0 ? at::full({ranks, num_experts_}, slots, at::kLong) : experts_.all_gather(routing.count_E.unsqueeze(0), 0);
  const device::HostCopy to_host(counts);
  const auto ends = [&](const Tensor& count_NL) {
    const Tensor end_L = at::cumsum(count_NL.sum(0), 0, at::kInt);
    return end_L.device() == device ? end_L : device::send(end_L, device);
  };
  if (slots == 0 && routing.capacity == 0) route.order = sort_by_expert(routing.expert_TK, num_experts_);
  if (peers == 1) route.end_L = ends(counts.narrow(1, experts_.rank() * num_local_, num_local_));
  const auto sent_E = [to_host, rank = experts_.rank()] { return to_host.wait()[rank].contiguous(); };
  const auto count_of_own = [to_host, first = experts_.rank() * num_local_, local = num_local_] { return to_host.wait().narrow(1, first, local).contiguous(); };
  route.splits = std::async(std::launch::deferred, [=] { return runs(sent_E(), count_of_own(), peers > 1); }).share();
  if (slots > 0) {
    route.order = slots_by_expert(routing.expert_TK, 0, num_experts_, slots);
  } else if (routing.capacity > 0) {
    route.order = sort_by_expert(routing.expert_TK, 0, num_experts_, sent_E().sum().item<int64_t>());
  }
  if (peers == 1) return route;
  const Tensor count_SL = count_of_own();
  const Tensor count_PSL = slots > 0 ? count_SL.expand({peers, ranks, num_local_}).contiguous() : expert_tensor_.all_gather(count_SL.unsqueeze(0), 0);
  route.rows_P = numbers(count_PSL.flatten(1).sum(1));
  route.by_expert_R = by_expert(numbers(count_PSL), peers * ranks, num_local_, device);
  route.by_sender_R = inverse_of(route.by_expert_R);
  route.end_L = ends(count_PSL.flatten(0, 1));
  return route;
}

Route Dispatcher::plan_all_gather(const Routing& routing) const {
  const int64_t ranks = experts_.size(), peers = expert_tensor_.size(), slots = this->slots(routing) * ranks * peers;
  const int64_t tokens = routing.expert_TK.size(0), first = experts_.rank() * num_local_;
  Route route;
  route.tokens_S = slots > 0 ? Rows(static_cast<size_t>(ranks), tokens) : experts_.all_gather(tokens);
  const int64_t of_group = std::accumulate(route.tokens_S.begin(), route.tokens_S.end(), int64_t{0});
  route.rows_P = slots > 0 ? Rows(static_cast<size_t>(peers), of_group) : expert_tensor_.all_gather(of_group);
  const Tensor expert_TK = of_all(routing.expert_TK, route);
  if (slots > 0) {
    route.order = slots_by_expert(expert_TK, first, num_local_, slots);
  } else {
    route.order = sort_by_expert(expert_TK, first, num_local_, count_choices(expert_TK, num_local_, first).sum().item<int64_t>());
  }
  route.end_L = route.order.end_E;
  return route;
}

Tensor Dispatcher::of_all(const Tensor& x_TD, const Route& route) const {
  return gather_rows(expert_tensor_, gather_rows(experts_, x_TD, route.tokens_S), route.rows_P);
}

Tensor Dispatcher::travel(const Tensor& x_ND, const Route& route) const {
  const Tensor arrived = exchange(experts_, x_ND, splits_of(route));
  return route.by_expert_R.defined() ? permute_rows(gather_rows(expert_tensor_, arrived, route.rows_P), route.by_expert_R) : arrived;
}

Tensor Dispatcher::dispatch(const Tensor& x_TD, const Route& route) const {
  const TraceRange range("dispatch");
  if (how_ == Dispatch::all_gather) return spread_rows(of_all(x_TD, route), route.order);
  return travel(spread_rows(x_TD, route.order), route);
}

// Each choice's weight is a row of one number.
Tensor Dispatcher::spread_weights(const Tensor& weight_TK, const Route& route) const { return spread_rows(weight_TK.reshape({-1, 1}), by_choice(route.order)); }

Tensor Dispatcher::weights(const Tensor& weight_TK, const Route& route) const {
  const TraceRange range("weights");
  if (how_ == Dispatch::all_gather) return spread_weights(of_all(weight_TK, route), route);
  return travel(spread_weights(weight_TK, route), route);
}

// The weights travel first: so backward comes from the experts to the rows' way, which is long enough to hide what was Postponed.
std::pair<Tensor, Tensor> Dispatcher::dispatch(const Tensor& x_TD, const Tensor& weight_TK, const Route& route) const {
  const TraceRange range("dispatch");
  if (how_ == Dispatch::all_gather) {
    const Tensor weight_R1 = weights(weight_TK, route);
    return {dispatch(x_TD, route), weight_R1};
  }
  const Tensor weight_N1 = spread_weights(weight_TK, route), x_ND = spread_rows(x_TD, route.order), weight_R1 = travel(weight_N1, route);
  return {travel(x_ND, route), weight_R1};
}

Tensor Dispatcher::combine(const Tensor& y_RD, const Route& route, const Tensor& onto_TD) const {
  const TraceRange range("combine");
  if (how_ == Dispatch::all_gather) {
    const Tensor partial = sum_rows(y_RD, route.order, at::kFloat);
    const Tensor y_TD = reduce_scatter_rows(experts_, reduce_scatter_rows(expert_tensor_, partial, route.rows_P), route.tokens_S);
    return (onto_TD.defined() ? onto_TD + y_TD : y_TD).to(y_RD.scalar_type());
  }
  const Tensor own_RD = route.by_sender_R.defined() ? reduce_scatter_rows(expert_tensor_, permute_rows(y_RD, route.by_sender_R), route.rows_P) : y_RD;
  const Splits splits = splits_of(route);
  const Tensor y_ND = exchange(experts_, own_RD, {splits.receive, splits.send});
  return onto_TD.defined() ? add_rows(onto_TD, y_ND, route.order) : sum_rows(y_ND, route.order);
}

}  // namespace upcycle
