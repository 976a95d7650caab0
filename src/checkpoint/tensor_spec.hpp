#pragma once
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <string>

#include "base/box.hpp"
#include "checkpoint/blocks.hpp"

namespace upcycle {

/// Name, dtype (float32, bfloat16 or int64) and global shape of a tensor in a file.
struct TensorSpec {
  std::string name;
  at::ScalarType dtype;
  Shape shape;
  bool operator==(const TensorSpec&) const = default;

  /// Bytes of an element, and of all of them.
  int64_t width() const { return static_cast<int64_t>(c10::elementSize(dtype)); }
  int64_t bytes() const { return elements(shape) * width(); }
  /// How it is cut for checksums and for writing.
  Blocks blocks() const { return Blocks(shape, width()); }
};

}  // namespace upcycle
