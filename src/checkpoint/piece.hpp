#pragma once
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/box.hpp"
#include "base/tensor.hpp"

namespace upcycle {

/// A rank's part of one global tensor. Checkpoints know names, shapes and boxes, nothing about models.
struct Piece {
  std::string name;  ///< of the global tensor; its HDF5 path is the name with '.' as group separators
  Shape shape;       ///< global
  Box box;           ///< what this is of it
  Tensor local;      ///< box.size, float32, bfloat16 or int64, CPU or CUDA; may be a strided view

  /// For writers, instead of `local`, values that need not all be in memory: fills `target` (CPU, contiguous, `stored`, of the size of
  /// `part`) with `part`, a box inside `box`. Called by the thread that calls CheckpointWriter::add, for parts in row-major order.
  std::function<void(const Box& part, Tensor target)> read = {};
  at::ScalarType stored = at::kFloat;

  at::ScalarType dtype() const { return local.defined() ? local.scalar_type() : stored; }
};

}  // namespace upcycle
