#include "parallel/host_collectives.hpp"

#include <algorithm>
#include <memory>
#include <vector>

#include "parallel/reduce.hpp"

namespace upcycle::mpi {
namespace {

// Below this many bytes (over all ranks) an all-reduce is one exchange of everything instead of two of parts.
constexpr int64_t kSmallBytes = 64 << 10;

std::vector<Block> to_all(const Ranks& ranks, Block block) { return std::vector<Block>(static_cast<size_t>(ranks.size), block); }

/// Receives a block of out's bytes from each rank and folds them into `out` in the ranks' order; to_each[r] goes to rank r.
void reduce_from_each(const Ranks& ranks, const std::vector<Block>& to_each, Block out, at::ScalarType dtype, Reduce how) {
  const auto scratch = std::make_unique_for_overwrite<std::byte[]>(static_cast<size_t>(ranks.size * out.bytes));
  std::vector<Block> from_each;
  std::vector<const std::byte*> parts;
  for (int r = 0; r < ranks.size; ++r) {
    from_each.push_back({scratch.get() + r * out.bytes, out.bytes});
    parts.push_back(from_each.back().data);
  }
  exchange(ranks.communicator, to_each, from_each, ranks.piece_bytes);
  reduce_in_order(parts, out.data, out.bytes / static_cast<int64_t>(c10::elementSize(dtype)), dtype, how);
}

}  // namespace

void gather(const Ranks& ranks, Block own, std::byte* into) {
  std::vector<Block> from_each;
  for (int r = 0; r < ranks.size; ++r) from_each.push_back({into + r * own.bytes, own.bytes});
  exchange(ranks.communicator, to_all(ranks, own), from_each, ranks.piece_bytes);
}

void all_reduce(const Ranks& ranks, const Tensor& x, Reduce how) {
  const Block all = block_of(x);
  if (all.bytes * ranks.size <= kSmallBytes) return reduce_from_each(ranks, to_all(ranks, all), all, x.scalar_type(), how);
  // Each rank reduces one part and hands it to all others: every byte is sent twice, and one rank decides each bit.
  std::vector<Block> parts;
  for (int64_t r = 0; r < ranks.size; ++r) {
    const int64_t begin = x.numel() * r / ranks.size * x.element_size(), end = x.numel() * (r + 1) / ranks.size * x.element_size();
    parts.push_back({all.data + begin, end - begin});
  }
  const Block own = parts[static_cast<size_t>(ranks.rank)];
  reduce_from_each(ranks, parts, own, x.scalar_type(), how);
  exchange(ranks.communicator, to_all(ranks, own), parts, ranks.piece_bytes);
}

void reduce_scatter(const Ranks& ranks, const Tensor& parts_P, const Tensor& out) {
  const Block all = block_of(parts_P), own = block_of(out);
  const int64_t step = std::max<int64_t>(1, ranks.piece_bytes / out.element_size()) * out.element_size();
  for (int64_t begin = 0; begin < own.bytes; begin += step) {
    const int64_t bytes = std::min(step, own.bytes - begin);
    std::vector<Block> to_each;
    for (int r = 0; r < ranks.size; ++r) to_each.push_back({all.data + r * own.bytes + begin, bytes});
    reduce_from_each(ranks, to_each, {own.data + begin, bytes}, out.scalar_type(), Reduce::sum);
  }
}

}  // namespace upcycle::mpi
