#pragma once
#include <functional>

#include "parallel/communicator.hpp"

/// Where parallelism meets autograd: each region is one function whose backward is the transpose of its forward
/// (after Megatron-LM's mappings.py). On a group of one rank each returns its argument.
namespace upcycle {

/// Which rows an all-to-all takes where (Communicator::all_to_all).
struct Splits {
  std::vector<Communicator::Run> send, receive;
};
/// What to do while a forward's exchange is under way, on a GPU beside it; not called where nothing travels.
using Meanwhile = std::function<void()>;
//                                                                                          forward        | backward
Tensor gather_along(const Communicator&, const Tensor& x, int64_t dim, Meanwhile = {});  // all-gather     | reduce-scatter
Tensor reduce_scatter_along(const Communicator&, const Tensor& x, int64_t dim);          // reduce-scatter | all-gather
Tensor gather_sequence(const Communicator&, const Tensor& x_BC, Meanwhile = {});         // all-gather     | reduce-scatter
Tensor exchange(const Communicator&, const Tensor& x_ND, const Splits&);                 // all-to-all     | its reverse
// gather_sequence: a context rank's positions, [B, C, ...], become the whole sequence's, [B, S, ...], in its order (zigzag.hpp).

// The same along dim 0 where ranks have different numbers of rows: rows[r] of rank r, the same list on all of them. They travel
// padded to the most of any rank, so that each is one ordinary collective.
using Rows = std::vector<int64_t>;
Tensor gather_rows(const Communicator&, const Tensor& x_ND, const Rows&);          // all-gather     | reduce-scatter
Tensor reduce_scatter_rows(const Communicator&, const Tensor& x_ND, const Rows&);  // reduce-scatter | all-gather

}  // namespace upcycle
