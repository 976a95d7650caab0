#pragma once
#include <cstdint>
#include <vector>

#include "base/box.hpp"
#include "base/tensor.hpp"

namespace upcycle {

/// Bytes of host memory that a transfer between tensors and files takes at most, whatever the tensors' sizes (unless
/// one element is larger).
inline constexpr int64_t kSlabBytes = int64_t{32} << 20;

/// Cuts a row-major array of shape `size` into boxes of at most `max_elements` elements (at least one), in order, each
/// one run of elements: all of them laid end to end are the array. Empty when `size` has no elements.
std::vector<Box> slabs(const Shape& size, int64_t max_elements);

/// The boxes that together are the elements [begin, end) of a row-major array of shape `size`, in order, each one run of elements; at
/// most 2 * dims - 1 of them.
std::vector<Box> boxes_of_run(const Shape& size, int64_t begin, int64_t end);

/// The view of `x` that `box` describes.
Tensor view_of(const Tensor& x, const Box& box);

/// `inner`, a box of a box's own coordinates, in the coordinates of the whole.
Box shifted(const Box& inner, const Shape& by);

}  // namespace upcycle
