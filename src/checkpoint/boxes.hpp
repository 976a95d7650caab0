#pragma once
#include <cstdint>
#include <optional>
#include <vector>

#include "base/box.hpp"
#include "base/tensor.hpp"
#include "checkpoint/blocks.hpp"

namespace upcycle {

/// The boxes that together are the elements [begin, end) of a row-major array of shape `size`, in order, each one run of elements; at
/// most 2 * dims - 1 of them.
std::vector<Box> boxes_of_run(const Shape& size, int64_t begin, int64_t end);

/// The elements from the first to the last of `box`, which has some, in the row-major order of a tensor of shape `shape`.
ElementRange span_of(const Box& box, const Shape& shape);

/// What two boxes of one tensor have in common; nothing when that is no element.
std::optional<Box> intersection(const Box& a, const Box& b);

/// The view of `x` that `box` describes.
Tensor view_of(const Tensor& x, const Box& box);

/// `inner`, a box of a box's own coordinates, in the coordinates of the whole; and back: `inner`, which lies in `outer`, in the
/// coordinates of `outer`.
Box shifted(const Box& inner, const Shape& by);
Box relative_to(const Box& inner, const Box& outer);

}  // namespace upcycle
