#include "checkpoint/boxes.hpp"

#include <algorithm>

namespace upcycle {
namespace {

// Elements [begin, end) of the dims from `dim` on, below the indices that `at` has in front of them.
void add_run(const Shape& size, size_t dim, Box at, int64_t begin, int64_t end, std::vector<Box>& out) {
  if (begin == end) return;
  int64_t row = 1;
  for (size_t inner = dim + 1; inner < size.size(); ++inner) row *= size[inner];
  const auto inside_row = [&](int64_t index, int64_t from, int64_t to) {
    at.begin[dim] = index;
    at.size[dim] = 1;
    add_run(size, dim + 1, at, from, to, out);
  };
  const int64_t first = (begin + row - 1) / row, last = end / row;   // whole rows [first, last)
  if (first > last) return inside_row(last, begin - last * row, end - last * row);
  if (begin < first * row) inside_row(first - 1, begin - (first - 1) * row, row);
  if (first < last) {
    Box rows = at;
    rows.begin[dim] = first;
    rows.size[dim] = last - first;
    out.push_back(rows);
  }
  if (end > last * row) inside_row(last, 0, end - last * row);
}

}  // namespace

std::vector<Box> boxes_of_run(const Shape& size, int64_t begin, int64_t end) {
  std::vector<Box> out;
  if (begin == end) return out;
  if (size.empty()) return {whole(size)};
  add_run(size, 0, whole(size), begin, end, out);
  return out;
}

ElementRange span_of(const Box& box, const Shape& shape) {
  int64_t first = 0, last = 0;
  for (size_t dim = 0; dim < shape.size(); ++dim) {
    first = first * shape[dim] + box.begin[dim];
    last = last * shape[dim] + box.begin[dim] + box.size[dim] - 1;
  }
  return {first, last + 1};
}

std::optional<Box> intersection(const Box& a, const Box& b) {
  Box out = a;
  for (size_t dim = 0; dim < a.size.size(); ++dim) {
    out.begin[dim] = std::max(a.begin[dim], b.begin[dim]);
    out.size[dim] = std::min(a.begin[dim] + a.size[dim], b.begin[dim] + b.size[dim]) - out.begin[dim];
    if (out.size[dim] <= 0) return std::nullopt;
  }
  return out;
}

Tensor view_of(const Tensor& x, const Box& box) {
  Tensor view = x;
  for (size_t dim = 0; dim < box.size.size(); ++dim)
    view = view.narrow(static_cast<int64_t>(dim), box.begin[dim], box.size[dim]);
  return view;
}

Box shifted(const Box& inner, const Shape& by) {
  Box out = inner;
  for (size_t dim = 0; dim < by.size(); ++dim) out.begin[dim] += by[dim];
  return out;
}

Box relative_to(const Box& inner, const Box& outer) {
  Box out = inner;
  for (size_t dim = 0; dim < out.begin.size(); ++dim) out.begin[dim] -= outer.begin[dim];
  return out;
}

}  // namespace upcycle
