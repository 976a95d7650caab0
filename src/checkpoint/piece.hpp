#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "base/box.hpp"
#include "base/tensor.hpp"

namespace upcycle {

/// A rank's part of one global tensor. Checkpoints know names, shapes and boxes, nothing about models.
struct Piece {
  std::string name;  ///< of the global tensor; its HDF5 path is the name with '.' as group separators
  Shape shape;       ///< global
  Box box;           ///< what `local` is of it; writers' boxes of one tensor must cover it without overlap
  Tensor local;      ///< box.size, float32, bfloat16 or int64, CPU or CUDA; may be a strided view
};

}  // namespace upcycle
