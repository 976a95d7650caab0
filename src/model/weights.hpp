#pragma once
#include <deque>
#include <string>
#include <vector>

#include "model/buckets.hpp"
#include "model/holders.hpp"
#include "ops/parameter.hpp"

namespace upcycle {

/// A catalogue entry inside a tensor in memory: rows [begin, begin + box.size[dim]) along `dim` of it are `box` of the parameter.
struct Part {
  ParameterSpec spec;
  Box box;
  int64_t dim = 0;
  int64_t begin = 0;
  /// The part's view of `tensor`, which has the shape of the weight's value (the value itself, its gradient).
  Tensor of(const Tensor& tensor) const { return tensor.narrow(dim, begin, box.size[dim]); }
};

/// One tensor in memory: one parameter, or several side by side so that one product serves all (q, k, v; gate and up).
struct Weight {
  Parameter parameter;
  std::vector<Part> parts;
  Shape shape;
  const ParameterSpec& spec() const { return parts.front().spec; }
};

/// The weights that one rank holds: made of the catalogue's boxes, allocated at once, bucket by bucket.
class Weights {
 public:
  Weights(const Architecture&, const Layout&, const Coordinates& here);

  /// The weight made of the named parameters, one after another along `dim`; addresses stay valid. Nothing is allocated yet. The
  /// same ranks hold the same boxes of all of them (std::logic_error): their gradient is one piece.
  Parameter& add(const std::vector<std::string>& names, int64_t dim = 0);

  /// Values in `compute` dtype (routers in fp32), fp32 masters and zeroed fp32 gradients, on `device`. Where values are fp32 they are
  /// the masters. With `zero` 1 (and values that are not fp32) whole masters exist only until training starts, in the memory of
  /// the gradients, which come then: 6 bytes a parameter, and never more than training takes.
  void allocate(at::ScalarType compute, at::Device device, int64_t zero = 0);

  /// Values alone, as allocate() makes them, of undefined content: for models that are looked at and never trained.
  void allocate_for_inference(at::ScalarType compute, at::Device device);

  /// From here on each rank keeps the masters of its own elements only, and gradients are zero. Called by the optimizer; once.
  void start_training();

  std::deque<Weight>& all() noexcept { return weights_; }
  const std::deque<Weight>& all() const noexcept { return weights_; }
  /// In the order in which backward completes them.
  std::vector<Bucket>& buckets() noexcept { return buckets_; }
  const std::vector<Bucket>& buckets() const noexcept { return buckets_; }
  const HolderGroups& groups() const noexcept { return groups_; }

  /// Copies masters into values (rounding to the compute dtype): all of them, and in training those that this rank owns.
  void publish();
  const Architecture& architecture() const noexcept { return architecture_; }
  const Layout& layout() const noexcept { return layout_; }

 private:
  Architecture architecture_;
  Layout layout_;
  Coordinates here_;
  HolderGroups groups_;
  std::vector<ParameterSpec> catalogue_;
  std::deque<Weight> weights_;
  std::vector<Bucket> buckets_;
};

/// While one lives, the model computes with its fp32 masters: nothing is copied, values point elsewhere. Before training starts: with
/// ZeRO-1 nobody has all masters afterwards.
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
