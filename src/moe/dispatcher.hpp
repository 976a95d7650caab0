#pragma once
#include <future>
#include <utility>

#include "config/run_config.hpp"
#include "moe/router.hpp"
#include "ops/permute.hpp"
#include "parallel/regions.hpp"

// Shapes: T tokens here, K choices of each, E experts of the layer, L of them on this rank, N rows that leave, R rows that arrive, D width;
// S ranks of the expert group, P ranks that share an expert's width (the expert_tensor group).
namespace upcycle {

/// Where each row goes and how it comes home: made once for a routing, good for any pass over the same tokens.
struct Route {
  Tensor end_L;         ///< int32: expert l owns rows end[l-1] .. end[l] of those that arrive; on the device of the rows
  RowOrder order;       ///< how choices become rows: all-to-all, of this rank's tokens; all-gather, of everyone's
  /// all-to-all: the runs of rows that go to and come from each rank of the expert group. Deferred: how many rows they have comes from the
  /// device, and whoever asks first waits for that.
  std::shared_future<Splits> splits;
  Tensor by_expert_R;   ///< all-to-all: order of arrival -> sorted by local expert; undefined when they arrive sorted (P = 1)
  Tensor by_sender_R;   ///< its inverse
  Rows tokens_S;        ///< all-gather: the tokens of each rank of the expert group
  Rows rows_P;          ///< rows that each rank of the expert_tensor group brings: arrived ones (all-to-all, P > 1), tokens (all-gather)
};

struct DispatcherSettings {
  int64_t experts = 0;
  int64_t top_k = 0;
  Dispatch how = Dispatch::automatic;
  bool pad = false;     ///< limited routings: every rank sends each expert min(capacity, T) rows, zeros where it has fewer
};

/// `wish`, or for Dispatch::automatic the way on which a rank receives fewer bytes in forward, with `ranks` in the expert group and
/// `peers` that share an expert's width.
Dispatch chosen_dispatch(Dispatch wish, int64_t top_k, int64_t ranks, int64_t peers);

/// Brings each token's row and weights to its experts' ranks, and the sums of the results back. The expert group's ranks hold equal
/// consecutive shares of the experts, the expert_tensor group's ranks equal parts of each one's width.
/// all-to-all: K rows of a token travel to the ranks of its experts. all-gather: every rank gets all tokens' rows once, computes those of
/// its own experts, and the parts are summed where the tokens live. Both give the same numbers but for rounding.
/// Ranks without rows take part in every exchange, forward and backward.
class Dispatcher {
 public:
  Dispatcher(const Communicator& experts, const Communicator& expert_tensor, DispatcherSettings);

  /// **Collective** over both groups. With one rank nothing is read on the host unless choices were dropped; with several, counts cross
  /// once, and the host reads them when rows travel, or here where choices were dropped or widths are cut. When padding, nothing crosses and nothing is read; all ranks must have as many tokens then.
  Route plan(const Routing& routing) const;
  /// **Collective** over both groups. [T, D] -> [R, D] sorted by local expert.
  Tensor dispatch(const Tensor& x_TD, const Route& route) const;
  /// **Collective** over both groups. fp32 [T, K] -> [R, 1]: the weight of each of dispatch's rows, 0 where no choice is. Backward brings
  /// each choice its gradient, summed over the ranks that share its expert's width.
  Tensor weights(const Tensor& weight_TK, const Route& route) const;
  /// **Collective** over both groups. Both, (rows, weights): the way to do it, which gives the device all it can do before the host waits.
  std::pair<Tensor, Tensor> dispatch(const Tensor& x_TD, const Tensor& weight_TK, const Route& route) const;
  /// **Collective** over both groups. y_TD = sum_k y; `y_RD` in the order of dispatch's rows, weighed; each expert_tensor rank's are its
  /// part of a sum. With `onto_TD`, onto + that.
  Tensor combine(const Tensor& y_RD, const Route& route, const Tensor& onto_TD = {}) const;

  /// The one in use; Dispatch::automatic was decided when it was made.
  Dispatch how() const noexcept { return how_; }
  /// Rows never leave this rank.
  bool at_home() const noexcept { return experts_.size() * expert_tensor_.size() == 1; }

 private:
  Route plan_all_to_all(const Routing& routing) const;
  Route plan_all_gather(const Routing& routing) const;
  int64_t slots(const Routing& routing) const;
  Tensor of_all(const Tensor& x_TD, const Route& route) const;
  Tensor spread_weights(const Tensor& weight_TK, const Route& route) const;
  Tensor travel(const Tensor& x_ND, const Route& route) const;

  const Communicator& experts_;
  const Communicator& expert_tensor_;
  int64_t num_experts_;
  int64_t num_local_;
  Dispatch how_;
  bool pad_;
};

}  // namespace upcycle
