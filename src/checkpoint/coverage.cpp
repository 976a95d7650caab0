#include "checkpoint/coverage.hpp"

#include <map>
#include <nlohmann/json.hpp>

#include "base/error.hpp"

namespace upcycle {
namespace {

struct Part {
  Box box;
  size_t rank;
};

struct Declared {
  TensorSpec spec;
  std::vector<Part> parts;
};

bool overlap(const Box& a, const Box& b) {
  for (size_t dim = 0; dim < a.size.size(); ++dim) {
    if (a.begin[dim] + a.size[dim] <= b.begin[dim] || b.begin[dim] + b.size[dim] <= a.begin[dim]) return false;
  }
  return elements(a) > 0 && elements(b) > 0;
}

/// Boxes inside the tensor that don't overlap and have as many elements as it cover it.
void check(const Declared& tensor) {
  const auto wrong = [&](const auto&... what) {
    throw std::logic_error(text("tensor '", tensor.spec.name, "' ", describe(tensor.spec.shape), ": ", what...));
  };
  int64_t covered = 0;
  for (size_t i = 0; i < tensor.parts.size(); ++i) {
    const Part& part = tensor.parts[i];
    if (!inside(part.box, tensor.spec.shape))
      wrong("the box ", describe(part.box), " of rank ", part.rank, " is not inside");
    covered += elements(part.box);
    for (size_t j = 0; j < i; ++j) {
      const Part& other = tensor.parts[j];
      if (overlap(part.box, other.box)) {
        wrong("the boxes ", describe(other.box), " of rank ", other.rank, " and ", describe(part.box), " of rank ",
              part.rank, " overlap");
      }
    }
  }
  if (covered != elements(tensor.spec.shape))
    wrong("all ranks' boxes cover ", covered, " of ", elements(tensor.spec.shape), " elements");
}

}  // namespace

std::string declare(std::span<const Piece> pieces) {
  nlohmann::json out = nlohmann::json::array();
  for (const Piece& piece : pieces) {
    if (piece.local.sizes() != at::IntArrayRef(piece.box.size)) {
      throw std::logic_error(text("tensor '", piece.name, "': a piece of shape ", describe(piece.local.sizes().vec()),
                                  " for the box ", describe(piece.box)));
    }
    out.push_back(
        {piece.name, static_cast<int>(piece.local.scalar_type()), piece.shape, piece.box.begin, piece.box.size});
  }
  return out.dump();
}

std::vector<TensorSpec> check_coverage(std::span<const std::string> declarations) {
  std::map<std::string, Declared> tensors;
  for (size_t rank = 0; rank < declarations.size(); ++rank) {
    for (const auto& piece : nlohmann::json::parse(declarations[rank])) {
      const TensorSpec spec{piece[0], static_cast<at::ScalarType>(piece[1].get<int>()), piece[2].get<Shape>()};
      hdf5_path(spec.name);
      Declared& tensor = tensors.try_emplace(spec.name, Declared{spec, {}}).first->second;
      if (tensor.spec != spec) {
        throw std::logic_error(text("tensor '", spec.name, "': rank ", rank, " says ", c10::toString(spec.dtype),
                                    describe(spec.shape), ", rank ", tensor.parts.front().rank, " says ",
                                    c10::toString(tensor.spec.dtype), describe(tensor.spec.shape)));
      }
      tensor.parts.push_back({{piece[3].get<Shape>(), piece[4].get<Shape>()}, rank});
    }
  }
  std::vector<TensorSpec> specs;
  for (const auto& [name, tensor] : tensors) {
    check(tensor);
    specs.push_back(tensor.spec);
  }
  return specs;
}

}  // namespace upcycle
