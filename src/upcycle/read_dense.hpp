#pragma once
#include <functional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/box.hpp"
#include "base/tensor.hpp"

namespace upcycle {

/// Reads boxes of a source's tensors (CPU, any float dtype); the caller decides where from. Several sources of one shape read as the
/// mean of all, and each by itself.
class ReadDense {
 public:
  using One = std::function<Tensor(const std::string& name, const Box& box)>;

  /// Of one source: whatever can be called as One.
  template <class Read>
    requires(!std::is_same_v<std::remove_cvref_t<Read>, ReadDense> && std::is_invocable_r_v<Tensor, Read&, const std::string&, const Box&>)
  ReadDense(Read read) : each_{One(std::move(read))} {}
  /// Of several; at least one.
  explicit ReadDense(std::vector<One> each) : each_(std::move(each)) {}

  /// `box` of tensor `name`: of several sources their mean, fp32, summed in fp64 in their order.
  Tensor operator()(const std::string& name, const Box& box) const;
  int64_t sources() const { return static_cast<int64_t>(each_.size()); }
  /// Source `index` alone.
  ReadDense of(int64_t index) const { return ReadDense(std::vector<One>{each_.at(static_cast<size_t>(index))}); }

 private:
  std::vector<One> each_;
};

}  // namespace upcycle
