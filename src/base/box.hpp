#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace upcycle {

using Shape = std::vector<int64_t>;

/// A rectangle of a global tensor: `begin[d] .. begin[d] + size[d]` in every dim.
struct Box {
  Shape begin;
  Shape size;
  bool operator==(const Box&) const = default;
};

/// The box that is the whole of `shape`.
Box whole(const Shape& shape);

/// Number of elements.
int64_t elements(const Shape& shape);
inline int64_t elements(const Box& box) { return elements(box.size); }

/// True when `box` has the rank of `shape` and lies inside it.
bool inside(const Box& box, const Shape& shape);

/// "[8, 96, 128]", and "[0:4, 0:96, 0:128]" for a box.
std::string describe(const Shape& shape);
std::string describe(const Box& box);

}  // namespace upcycle
