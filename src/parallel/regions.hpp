#pragma once
#include <functional>

#include "parallel/communicator.hpp"

/// Where parallelism meets autograd: each region is one function whose backward is the transpose of its forward
/// (after Megatron-LM's mappings.py). On a group of one rank each returns its argument.
namespace upcycle {

/// Which rows an all-to-all takes where (Communicator::all_to_all).
struct Splits {
  std::vector<Communicator::Run> send, receive;
  /// Where an exchange is made in two goes: which of those runs travel first. Else empty.
  std::vector<bool> send_first, receive_first;
  Splits reversed() const { return {receive, send, receive_first, send_first}; }
};
/// What to do while a forward's exchange is under way, on a GPU beside it; not called where nothing travels.
using Meanwhile = std::function<void()>;
//                                                                                          forward        | backward
Tensor gather_along(const Communicator&, const Tensor& x, int64_t dim, Meanwhile = {});  // all-gather     | reduce-scatter
Tensor reduce_scatter_along(const Communicator&, const Tensor& x, int64_t dim);          // reduce-scatter | all-gather
Tensor gather_sequence(const Communicator&, const Tensor& x_BC);                         // all-gather     | reduce-scatter
Tensor exchange(const Communicator&, const Tensor& x_ND, const Splits&);                 // all-to-all     | its reverse
/// exchange in two goes. `arrived(y)` is called when the first one's rows are there, while the others are on their way.
Tensor exchange_ahead(const Communicator&, const Tensor& x_ND, const Splits&, const std::function<void(const Tensor& y_ND)>& arrived);
/// exchange in two goes. `make` is called while the first one's rows are on their way; it makes the others, in `x`, which is contiguous.
Tensor exchange_behind(const Communicator&, const Tensor& x_ND, const Splits&, const Meanwhile& make);

// gather_sequence: a context rank's positions, [B, C, ...], become the whole sequence's, [B, S, ...], in its order (zigzag.hpp).

// The same along dim 0 where ranks have different numbers of rows: rows[r] of rank r, the same list on all of them. They travel
// padded to the most of any rank, so that each is one ordinary collective.
using Rows = std::vector<int64_t>;
Tensor gather_rows(const Communicator&, const Tensor& x_ND, const Rows&);          // all-gather     | reduce-scatter
Tensor reduce_scatter_rows(const Communicator&, const Tensor& x_ND, const Rows&);  // reduce-scatter | all-gather

}  // namespace upcycle
