#include "checkpoint/slabs.hpp"

#include <algorithm>

namespace upcycle {

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
