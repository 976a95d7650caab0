#pragma once
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "device/device.hpp"
#include "ops/parameter.hpp"

// What gpu_bench's parts share: shapes of training steps, and a stopwatch for a device.
namespace upcycle::bench {

/// Sizes of a training step's operations. `tokens` of a micro-batch, in sequences of `sequence`.
struct Sizes {
  std::string name;
  int64_t tokens, sequence, hidden, heads, kv_heads, head_dim, ffn, experts, top_k, vocab;
  int64_t rows() const { return tokens * top_k; }   ///< of all experts
};
/// The three of the README's table; `tiny`: one that a CPU does at once.
std::vector<Sizes> training_shapes(bool tiny);
/// For the mixture layer alone: 4, 8 and 64 experts.
std::vector<Sizes> layer_shapes(bool tiny);

/// The least that an operation must do: bytes read and written once, floating-point operations.
struct Work {
  double bytes = 0, flops = 0;
};

/// Times work on one device. Between two runs more than the GPU's cache is overwritten, and the GPU stays busy long enough for the host to
/// get ahead: launches cost nothing, as in a step. Figures are medians of device time.
class Bench {
 public:
  /// Measures the ceilings: a copy, and a matrix product of 8192^3 (smaller ones when `tiny`).
  Bench(at::Device device, bool tiny);

  /// Prints a line of JSON: how long `run` takes, beside its bound (work over the ceilings) and beside `plain`. `prepare` and
  /// `prepare_plain` come before each run and are not timed.
  struct Way {
    std::function<void()> prepare, run;
  };
  void measure(const std::string& shape, const std::string& op, Work work, const Way& ours, const std::optional<Way>& plain = {});
  /// An op with a graph: forward, then backward from random gradients. `inputs`: the leaves, whose gradients are dropped before each run.
  struct Differentiable {
    std::function<std::vector<Tensor>()> forward;
    std::vector<Tensor> inputs;
  };
  void measure(const std::string& shape, const std::string& op, Work forward, Work backward, const Differentiable& ours,
               const std::optional<Differentiable>& plain = {});

  struct Time {
    double seconds, spread;   ///< median; half the distance from the 10th to the 90th percentile, as a share of it
  };
  /// `hidden_launches`: how many launches the host may need time for.
  Time time(const Way& way, int hidden_launches = 30);
  double bound(Work work) const { return std::max(work.bytes / copy_, work.flops / product_); }

  Tensor draw(const std::vector<int64_t>& shape, at::ScalarType dtype = at::kBFloat16) const;   ///< N(0, 1)
  Tensor leaf(const std::vector<int64_t>& shape) const { return draw(shape).requires_grad_(); }
  Parameter weight(const std::vector<int64_t>& shape, at::ScalarType dtype = at::kBFloat16) const;   ///< N(0, 0.02), with a zero main_grad

  const at::Device device;
  const bool tiny;

 private:
  void tell(const std::string& shape, const std::string& op, Work work, Time ours, std::optional<Time> plain) const;
  void rest();

  Tensor scratch_;
  double copy_ = 1, product_ = 1;   ///< bytes and FLOPs a second
};

void ops(Bench&);
void moe_layer(Bench&);

}  // namespace upcycle::bench
