#pragma once
#include "moe/router.hpp"
#include "ops/permute.hpp"
#include "parallel/regions.hpp"

// Shapes: T tokens here, K choices of each, E experts of the layer, L of them on this rank, N = T*K rows that leave,
// R rows that arrive, D width.
namespace upcycle {

/// Rows at their experts, and the receipt that combine() needs to bring them home.
struct Arrived {
  Tensor x_RD;          ///< sorted by local expert
  Tensor end_L;         ///< int32: expert l owns rows end[l-1] .. end[l]; on the device of the rows
  // the receipt
  RowOrder order;       ///< how the rows were sorted before they left
  Splits splits;        ///< how many went to and came from each rank
  Tensor by_expert_R;   ///< arrival order -> sorted by local expert; undefined when they arrive sorted (one rank)
  Tensor by_sender_R;   ///< its inverse
  Tensor weight_TK;
};

/// Sends each token's row to its experts' ranks and brings the results back, weighed and summed. The group's ranks hold equal
/// consecutive shares of the experts. Ranks without rows take part in every exchange, forward and backward.
class Dispatcher {
 public:
  Dispatcher(const Communicator& experts, int64_t num_experts);

  /// **Collective** over the expert group. With one rank nothing is read on the host; with several, counts cross once.
  Arrived dispatch(const Tensor& x_TD, const Routing& routing) const;
  /// **Collective** over the expert group. y_TD = sum_k weight * y; `y_RD` in the order of arrived.x_RD.
  Tensor combine(const Tensor& y_RD, const Arrived& arrived) const;

 private:
  const Communicator& group_;
  int64_t num_local_;
};

}  // namespace upcycle
