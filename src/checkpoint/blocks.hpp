#pragma once
#include <cstddef>
#include <cstdint>

#include "base/box.hpp"

namespace upcycle {

/// Elements [begin, end) of a tensor in row-major order.
struct ElementRange {
  int64_t begin;
  int64_t end;
  int64_t size() const noexcept { return end - begin; }
};

/// How a tensor is cut for checksums and for writing: runs of whole rows of its last dim (of elements, where it has one dim only). A
/// function of shape and element size alone, so that whoever reads a part on any layout can check what it reads.
class Blocks {
 public:
  /// A block has at most this many bytes, unless one row is larger.
  static constexpr int64_t kBytes = int64_t{4} << 20;
  /// Blocks begin on multiples of this many bytes of the tensor where rows allow it: what O_DIRECT wants.
  static constexpr int64_t kAlignment = 4096;

  Blocks(const Shape& shape, int64_t element_size);
  int64_t count() const noexcept { return (elements_ + step_ - 1) / step_; }
  ElementRange run(int64_t block) const noexcept;
  /// The block that holds an element.
  int64_t of(int64_t element) const noexcept { return element / step_; }

 private:
  int64_t elements_;
  int64_t step_;
};

/// XXH3-64 of a block's bytes.
uint64_t checksum(const void* data, size_t bytes) noexcept;

}  // namespace upcycle
