#include "parallel/regions.hpp"

#include <ATen/ops/zeros.h>

#include <stdexcept>

#include "base/autograd.hpp"
#include "base/error.hpp"
#include "parallel/zigzag.hpp"

namespace upcycle {
namespace {

/// The gradient that came, ready to travel. Where nobody asked for one it is zero: every rank takes part in every
/// exchange.
class Incoming {
 public:
  explicit Incoming(const Tensor& output) : sizes_(output.sizes().vec()), options_(output.options()) {}
  Tensor operator()(const std::vector<Tensor>& gradients) const {
    return gradients[0].defined() ? gradients[0].contiguous() : at::zeros(sizes_, options_);
  }

 private:
  std::vector<int64_t> sizes_;
  at::TensorOptions options_;
};

Tensor reduced(const Communicator& group, const Tensor& x) {
  Tensor sum = x.clone(at::MemoryFormat::Contiguous);
  group.all_reduce(sum);
  return sum;
}

Tensor own_slice(const Communicator& group, const Tensor& x, int64_t dim) {
  if (x.size(dim) % group.size() != 0) {
    throw std::logic_error(text("scatter_along: ", group.size(), " ranks do not divide dim ", dim, " of ", x.sizes()));
  }
  const int64_t part = x.size(dim) / group.size();
  return x.narrow(dim, group.rank() * part, part).contiguous();
}

/// The op `forward(x)` with `backward(dy)`, neither recorded by ATen.
template <class Forward, class Transpose>
Tensor region(const Tensor& x, Forward&& forward, Transpose transpose) {
  Tensor y;
  {
    const Unrecorded guard;
    y = forward(x.contiguous());
  }
  return record(y, {x}, [incoming = Incoming(y), transpose](const std::vector<Tensor>& dy) {
    return Gradients{transpose(incoming(dy))};
  });
}

}  // namespace

Tensor copy_into(const Communicator& group, const Tensor& x) {
  if (group.size() == 1) return x;
  return region(
      x, [](const Tensor& x) { return x; }, [&group](const Tensor& dy) { return reduced(group, dy); });
}

Tensor reduce_from(const Communicator& group, const Tensor& partial) {
  if (group.size() == 1) return partial;
  return region(
      partial, [&group](const Tensor& x) { return reduced(group, x); }, [](const Tensor& dy) { return dy; });
}

Tensor gather_along(const Communicator& group, const Tensor& x, int64_t dim) {
  if (group.size() == 1) return x;
  return region(
      x, [&](const Tensor& x) { return group.all_gather(x, dim); },
      [&group, dim](const Tensor& dy) { return group.reduce_scatter(dy, dim); });
}

Tensor scatter_along(const Communicator& group, const Tensor& x, int64_t dim) {
  if (group.size() == 1) return x;
  return region(
      x, [&](const Tensor& x) { return own_slice(group, x, dim); },
      [&group, dim](const Tensor& dy) { return group.all_gather(dy, dim); });
}

Tensor reduce_scatter_along(const Communicator& group, const Tensor& x, int64_t dim) {
  if (group.size() == 1) return x;
  return region(
      x, [&](const Tensor& x) { return group.reduce_scatter(x, dim); },
      [&group, dim](const Tensor& dy) { return group.all_gather(dy, dim); });
}

Tensor gather_sequence(const Communicator& group, const Tensor& x_BC) {
  if (group.size() == 1) return x_BC;
  return region(
      x_BC, [&](const Tensor& x) { return in_sequence_order(group.all_gather(x.unsqueeze(0), 0)); },
      [&group](const Tensor& dy_BS) { return group.reduce_scatter(in_rank_order(dy_BS, group.size()), 0).squeeze(0); });
}

Tensor exchange(const Communicator& group, const Tensor& x_ND, const Splits& splits) {
  if (group.size() == 1) return x_ND;
  return region(
      x_ND, [&](const Tensor& x) { return group.all_to_all(x, splits.send, splits.receive); },
      [&group, splits](const Tensor& dy_ND) { return group.all_to_all(dy_ND, splits.receive, splits.send); });
}

}  // namespace upcycle
