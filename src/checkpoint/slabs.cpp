#include "checkpoint/slabs.hpp"

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

std::vector<Box> slabs(const Shape& size, int64_t max_elements) {
  std::vector<Box> out;
  if (elements(size) == 0) return out;
  // The dims from `whole` on fit into one slab; the one before is cut into ranges, those in front are walked one by
  // one.
  size_t whole = size.size();
  int64_t inner = 1;
  while (whole > 0 && inner * size[whole - 1] <= max_elements) inner *= size[--whole];
  if (whole == 0) return {upcycle::whole(size)};
  const size_t cut = whole - 1;
  const int64_t step = std::max<int64_t>(1, max_elements / inner);

  Box box = upcycle::whole(size);
  for (size_t dim = 0; dim < cut; ++dim) box.size[dim] = 1;
  for (;;) {
    for (int64_t at = 0; at < size[cut]; at += step) {
      box.begin[cut] = at;
      box.size[cut] = std::min(step, size[cut] - at);
      out.push_back(box);
    }
    size_t dim = cut;
    while (dim > 0 && ++box.begin[dim - 1] == size[dim - 1]) box.begin[--dim] = 0;
    if (dim == 0) return out;
  }
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

}  // namespace upcycle
