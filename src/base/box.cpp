#include "base/box.hpp"

namespace upcycle {

Box whole(const Shape& shape) { return {Shape(shape.size(), 0), shape}; }

int64_t elements(const Shape& shape) {
  int64_t product = 1;
  for (const int64_t size : shape) product *= size;
  return product;
}

bool inside(const Box& box, const Shape& shape) {
  if (box.begin.size() != shape.size() || box.size.size() != shape.size()) return false;
  for (size_t dim = 0; dim < shape.size(); ++dim) {
    if (box.begin[dim] < 0 || box.size[dim] < 0 || box.begin[dim] + box.size[dim] > shape[dim]) return false;
  }
  return true;
}

std::string describe(const Shape& shape) {
  std::string out = "[";
  for (size_t dim = 0; dim < shape.size(); ++dim) out += (dim ? ", " : "") + std::to_string(shape[dim]);
  return out + "]";
}

std::string describe(const Box& box) {
  std::string out = "[";
  for (size_t dim = 0; dim < box.begin.size(); ++dim) {
    out += (dim ? ", " : "") + std::to_string(box.begin[dim]) + ":" + std::to_string(box.begin[dim] + box.size[dim]);
  }
  return out + "]";
}

}  // namespace upcycle
