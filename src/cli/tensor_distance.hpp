#pragma once
#include <cstdint>
#include <string>

#include "checkpoint/reader.hpp"

namespace upcycle {

/// How far two tensors of one shape are apart.
struct TensorDistance {
  int64_t elements = 0;
  int64_t differ = 0;        ///< whose bits differ; of two dtypes: whose values do
  int64_t not_finite = 0;    ///< of these, whose difference is no number: they count in nothing below
  double max_abs = 0.0;      ///< largest |a - b|
  double squares = 0.0;      ///< sum of (a - b)^2
  double reference = 0.0;    ///< sum of a^2, over the finite a

  /// |a - b| / |a|; infinite where a is zero and b is not.
  double relative_l2() const;
  /// Both together: of several tensors as if they were one.
  void add(const TensorDistance& other);
};

/// Of tensor `name` of `file` in `a` and `b`, which have it in the same shape. Reads each once, in bounded memory. Throws UserError where one
/// can't be read.
TensorDistance tensor_distance(const CheckpointReader& a, const CheckpointReader& b, const std::string& file, const std::string& name);

}  // namespace upcycle
