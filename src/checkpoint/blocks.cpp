#include "checkpoint/blocks.hpp"

#include <xxhash.h>

#include <algorithm>
#include <numeric>

namespace upcycle {

Blocks::Blocks(const Shape& shape, int64_t element_size) : elements_(elements(shape)) {
  const int64_t row = std::max<int64_t>(1, shape.size() < 2 ? 1 : shape.back());
  const int64_t row_bytes = row * element_size;
  int64_t rows = std::max<int64_t>(1, kBytes / row_bytes);
  const int64_t aligned = kAlignment / std::gcd(kAlignment, row_bytes);   // rows that are a multiple of kAlignment together
  if (rows >= aligned) rows -= rows % aligned;
  step_ = rows * row;
}

ElementRange Blocks::run(int64_t block) const noexcept { return {block * step_, std::min(elements_, (block + 1) * step_)}; }

uint64_t checksum(const void* data, size_t bytes) noexcept { return XXH3_64bits(data, bytes); }

}  // namespace upcycle
