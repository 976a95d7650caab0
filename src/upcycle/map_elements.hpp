#pragma once
#include <algorithm>

#include "base/box.hpp"
#include "base/tensor.hpp"
#include "base/threads.hpp"

namespace upcycle {

/// value(g, x) -> the new number, for every element of `target`; g is its flat index in the global tensor, x what `target` has. Called
/// on several threads, in any order: numbers drawn by index are the same on any number of them.
template <class Value>
void map_elements(const Shape& shape, const Box& box, const Tensor& target, Value value) {
  constexpr int64_t kOfThread = 1 << 14;   // elements: a few hundred microseconds of normal numbers
  const int64_t dims = target.dim(), columns = dims ? box.size.back() : 1;
  const int64_t rows = columns ? elements(box) / columns : 0;
  float* const data = target.data_ptr<float>();
  for_ranges(rows, std::max<int64_t>(1, kOfThread / std::max<int64_t>(1, columns)), [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      int64_t global = 0, local = 0, stride = 1, rest = row;   // stride: of the global tensor's rows
      for (int64_t d = dims - 2; d >= 0; --d) {
        global += (box.begin[d] + rest % box.size[d]) * stride;
        local += rest % box.size[d] * target.stride(d);
        stride *= shape[d];
        rest /= box.size[d];
      }
      if (dims) global = global * shape[dims - 1] + box.begin[dims - 1];
      const int64_t step = dims ? target.stride(dims - 1) : 0;
      for (int64_t column = 0; column < columns; ++column) {
        float& x = data[local + column * step];
        x = static_cast<float>(value(static_cast<uint64_t>(global + column), x));
      }
    }
  });
}

}  // namespace upcycle
