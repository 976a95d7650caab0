#include "parallel/regions.hpp"

#include <ATen/ops/cat.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <functional>
#include <map>
#include <numeric>
#include <stdexcept>

#include "base/autograd.hpp"
#include "base/error.hpp"
#include "base/postponed.hpp"
#include "device/side_stream.hpp"
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

/// `rows` of all ranks as blocks of one height.
struct Blocks {
  const Rows& rows;
  int64_t height = *std::max_element(rows.begin(), rows.end());
  bool even() const { return std::all_of(rows.begin(), rows.end(), [this](int64_t n) { return n == height; }); }
  Tensor padded(const Tensor& x) const {
    std::vector<int64_t> pad(static_cast<size_t>(2 * x.dim()), 0);   // last dim first: dim 0's end comes last
    pad.back() = height - x.size(0);
    return at::constant_pad_nd(x, pad);
  }
};

void want_rows(const char* call, const Communicator& group, const Tensor& x, const Rows& rows, int64_t here) {
  if (static_cast<int>(rows.size()) == group.size() && x.size(0) == here) return;
  throw std::logic_error(text(call, ": ", rows.size(), " numbers of rows on ", group.size(), " ranks, and ", here, " rows where ",
                              x.sizes(), " came"));
}

Tensor gathered_rows(const Communicator& group, const Tensor& x, const Rows& rows) {
  want_rows("gather_rows", group, x, rows, rows[static_cast<size_t>(group.rank())]);
  const Blocks blocks{rows};
  if (blocks.even()) return group.all_gather(x, 0);
  const Tensor all = group.all_gather(blocks.padded(x), 0);
  std::vector<Tensor> parts;
  for (size_t r = 0; r < rows.size(); ++r) parts.push_back(all.narrow(0, static_cast<int64_t>(r) * blocks.height, rows[r]));
  return at::cat(parts, 0);
}

Tensor reduced_rows(const Communicator& group, const Tensor& x, const Rows& rows) {
  want_rows("reduce_scatter_rows", group, x, rows, std::accumulate(rows.begin(), rows.end(), int64_t{0}));
  const Blocks blocks{rows};
  if (blocks.even()) return group.reduce_scatter(x, 0);
  std::vector<Tensor> parts;
  for (const Tensor& part : x.split_with_sizes(rows, 0)) parts.push_back(blocks.padded(part));
  return group.reduce_scatter(at::cat(parts, 0), 0).narrow(0, 0, rows[static_cast<size_t>(group.rank())]).contiguous();
}

/// exchange(x), which is under way while the current stream does what `meanwhile`, unless empty, asks of it.
Tensor beside(const Tensor& x, const std::function<Tensor(const Tensor&)>& exchange, const Meanwhile& meanwhile) {
  if (!meanwhile) return exchange(x);
  static std::map<at::DeviceType, device::SideStream> streams;   // a process computes on one GPU
  device::SideStream& stream = streams.try_emplace(x.device().type(), x.device()).first->second;
  Tensor arrived;
  stream.run([&] { arrived = exchange(x); });
  meanwhile();
  stream.join();
  return arrived;
}

/// The op `forward(x)` with `backward(dy)`, neither recorded by ATen.
template <class Forward, class Transpose>
Tensor region(const Tensor& x, Forward&& forward, Transpose transpose) {
  Tensor y;
  {
    const Unrecorded guard;
    y = forward(x.contiguous());
  }
  return record(y, {x}, [incoming = Incoming(y), transpose, ahead = Postponed::Ahead()](const std::vector<Tensor>& dy_1) {
    return Gradients{beside(incoming(dy_1), transpose, Postponed::waiting() ? Meanwhile(Postponed::finish) : Meanwhile())};
  });
}

}  // namespace

Tensor gather_along(const Communicator& group, const Tensor& x, int64_t dim, Meanwhile meanwhile) {
  if (group.size() == 1) return x;
  const auto gather = [&](const Tensor& x) { return group.all_gather(x, dim); };
  return region(
      x, [&](const Tensor& x) { return beside(x, gather, meanwhile); },
      [&group, dim](const Tensor& dy) { return group.reduce_scatter(dy, dim); });
}

Tensor reduce_scatter_along(const Communicator& group, const Tensor& x, int64_t dim) {
  if (group.size() == 1) return x;
  return region(
      x, [&](const Tensor& x) { return group.reduce_scatter(x, dim); },
      [&group, dim](const Tensor& dy) { return group.all_gather(dy, dim); });
}

Tensor gather_sequence(const Communicator& group, const Tensor& x_BC, Meanwhile meanwhile) {
  if (group.size() == 1) return x_BC;
  const auto gather = [&](const Tensor& x) { return in_sequence_order(group.all_gather(x.unsqueeze(0), 0)); };
  return region(
      x_BC, [&](const Tensor& x) { return beside(x, gather, meanwhile); },
      [&group](const Tensor& dy_BS) { return group.reduce_scatter(in_rank_order(dy_BS, group.size()), 0).squeeze(0); });
}

Tensor exchange(const Communicator& group, const Tensor& x_ND, const Splits& splits) {
  if (group.size() == 1) return x_ND;
  return region(
      x_ND, [&](const Tensor& x) { return group.all_to_all(x, splits.send, splits.receive); },
      [&group, splits](const Tensor& dy_ND) { return group.all_to_all(dy_ND, splits.receive, splits.send); });
}

Tensor gather_rows(const Communicator& group, const Tensor& x_ND, const Rows& rows) {
  if (group.size() == 1) return x_ND;
  return region(
      x_ND, [&](const Tensor& x) { return gathered_rows(group, x, rows); },
      [&group, rows](const Tensor& dy_ND) { return reduced_rows(group, dy_ND, rows); });
}

Tensor reduce_scatter_rows(const Communicator& group, const Tensor& x_ND, const Rows& rows) {
  if (group.size() == 1) return x_ND;
  return region(
      x_ND, [&](const Tensor& x) { return reduced_rows(group, x, rows); },
      [&group, rows](const Tensor& dy_ND) { return gathered_rows(group, dy_ND, rows); });
}

}  // namespace upcycle
