#pragma once
#include <deque>
#include <string>
#include <vector>

#include "model/catalogue.hpp"
#include "ops/parameter.hpp"

namespace upcycle {

/// A catalogue entry inside a tensor in memory: rows [begin, begin + box.size[dim]) along `dim` of it are `box` of the parameter.
struct Part {
  ParameterSpec spec;
  Box box;
  int64_t dim = 0;
  int64_t begin = 0;
  /// The part's view of `tensor`, which has the shape of the weight's value (the value itself, its master, its moments).
  Tensor of(const Tensor& tensor) const { return tensor.narrow(dim, begin, box.size[dim]); }
};

/// One tensor in memory: one parameter, or several side by side so that one product serves all (q, k, v; gate and up).
struct Weight {
  Parameter parameter;
  std::vector<Part> parts;
  Shape shape;
  const ParameterSpec& spec() const { return parts.front().spec; }
};

/// The weights that one rank holds: made of the catalogue's boxes, allocated at once.
class Weights {
 public:
  Weights(const Architecture&, const Layout&, const Coordinates& here);

  /// The weight made of the named parameters, one after another along `dim`; addresses stay valid. Nothing is allocated yet.
  Parameter& add(const std::vector<std::string>& names, int64_t dim = 0);

  /// Values in `compute` dtype (routers in fp32), fp32 masters (the same storage where the value is fp32) and zeroed fp32
  /// gradients, on `device`. Gradients that are summed over the same ranks lie in one flat buffer.
  void allocate(at::ScalarType compute, at::Device device);

  std::deque<Weight>& all() noexcept { return weights_; }
  const std::deque<Weight>& all() const noexcept { return weights_; }

  struct GradientBuffer {
    Axis axis;       ///< the ranks along it hold the same slices: their gradients are summed
    Tensor flat;     ///< fp32
  };
  std::vector<GradientBuffer>& gradients() noexcept { return gradients_; }

  /// How many ranks of the world hold the same slice as this one does.
  int64_t copies(const ParameterSpec&) const;
  /// Copies masters into values (rounding to the compute dtype).
  void publish();
  const Architecture& architecture() const noexcept { return architecture_; }
  const Layout& layout() const noexcept { return layout_; }

 private:
  Architecture architecture_;
  Layout layout_;
  Coordinates here_;
  std::vector<ParameterSpec> catalogue_;
  std::deque<Weight> weights_;
  std::vector<GradientBuffer> gradients_;
};

/// While one lives, the model computes with its fp32 masters: nothing is copied, values point elsewhere.
class ComputeWithMasters {
 public:
  explicit ComputeWithMasters(Weights&);
  ~ComputeWithMasters();
  ComputeWithMasters(const ComputeWithMasters&) = delete;
  ComputeWithMasters& operator=(const ComputeWithMasters&) = delete;

 private:
  Weights& weights_;
  std::vector<Tensor> values_;
};

}  // namespace upcycle
