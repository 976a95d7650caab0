#include "parallel/zigzag.hpp"

#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>

#include <stdexcept>

#include "base/error.hpp"

namespace upcycle {

std::vector<Stretch> zigzag(int64_t length, int ranks, int rank) {
  if (ranks == 1) return {{0, length}};
  if (length % (2 * ranks) != 0) throw std::logic_error(text(length, " positions in 2 x ", ranks, " chunks"));
  const int64_t chunk = length / (2 * ranks), mirror = 2 * ranks - 1 - rank;
  return {{rank * chunk, (rank + 1) * chunk}, {mirror * chunk, (mirror + 1) * chunk}};
}

Tensor take_zigzag(const Tensor& x_BS, int ranks, int rank) {
  if (ranks == 1) return x_BS;
  std::vector<Tensor> columns;
  for (const Stretch& held : zigzag(x_BS.size(1), ranks, rank)) columns.push_back(x_BS.narrow(1, held.begin, held.size()));
  return at::cat(columns, 1);
}

namespace {

// copy(part of the sequence, part of the rank's rows) for every chunk.
template <class Copy>
void for_each_chunk(const Tensor& x_BS, const Tensor& x_RBC, const Copy& copy) {
  const int ranks = static_cast<int>(x_RBC.size(0));
  for (int rank = 0; rank < ranks; ++rank) {
    int64_t row = 0;
    for (const Stretch& held : zigzag(x_BS.size(1), ranks, rank)) {
      copy(x_BS.narrow(1, held.begin, held.size()), x_RBC.select(0, rank).narrow(1, row, held.size()));
      row += held.size();
    }
  }
}

}  // namespace

Tensor in_sequence_order(const Tensor& x_RBC) {
  std::vector<int64_t> shape = x_RBC.sizes().slice(1).vec();
  shape[1] *= x_RBC.size(0);
  const Tensor x_BS = at::empty(shape, x_RBC.options());
  for_each_chunk(x_BS, x_RBC, [](const Tensor& sequence, const Tensor& rank) { sequence.copy_(rank); });
  return x_BS;
}

Tensor in_rank_order(const Tensor& x_BS, int ranks) {
  std::vector<int64_t> shape = x_BS.sizes().vec();
  shape[1] /= ranks;
  shape.insert(shape.begin(), ranks);
  const Tensor x_RBC = at::empty(shape, x_BS.options());
  for_each_chunk(x_BS, x_RBC, [](const Tensor& sequence, const Tensor& rank) { rank.copy_(sequence); });
  return x_RBC;
}

}  // namespace upcycle
