#include "bench.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/randn_like.h>
#include <ATen/ops/zeros.h>

#include <torch/csrc/autograd/autograd.h>

#include <algorithm>
#include <iostream>
#include <nlohmann/json.hpp>

#include "device/moment.hpp"

namespace upcycle::bench {
namespace {

constexpr int kWarmUp = 5, kRepeats = 25;

// 1 GiB: more than any cache, and 0.25 ms or more for the host to get ahead.
int64_t scratch_bytes(bool tiny) { return tiny ? int64_t{1} << 16 : int64_t{1} << 30; }

}  // namespace

std::vector<Sizes> training_shapes(bool tiny) {
  if (tiny) return {{"tiny", 64, 32, 64, 4, 2, 16, 32, 4, 2, 512}};
  return {{"1.7B E4", 16384, 4096, 2048, 16, 8, 128, 6144, 4, 2, 151936},
          {"1.7B E32 G8", 16384, 4096, 2048, 16, 8, 128, 768, 32, 8, 151936},
          {"14B E64 G8", 8192, 4096, 5120, 40, 8, 128, 2176, 64, 8, 151936}};
}

std::vector<Sizes> layer_shapes(bool tiny) {
  if (tiny) return training_shapes(true);
  return {{"1.7B E4", 16384, 4096, 2048, 16, 8, 128, 6144, 4, 2, 151936},
          {"1.7B E8", 16384, 4096, 2048, 16, 8, 128, 6144, 8, 2, 151936},
          {"14B E64 G8", 8192, 4096, 5120, 40, 8, 128, 2176, 64, 8, 151936}};
}

Bench::Bench(at::Device device, bool tiny)
    : device(device), tiny(tiny), scratch_(at::empty({scratch_bytes(tiny)}, at::TensorOptions(at::kByte).device(device))) {
  const Tensor other = at::empty_like(scratch_);
  copy_ = 2.0 * static_cast<double>(scratch_.numel()) / time({{}, [&] { Tensor(other).copy_(scratch_); }}).seconds;
  const int64_t side = tiny ? 128 : 8192;
  const Tensor a = draw({side, side}), b = draw({side, side});
  product_ = 2.0 * static_cast<double>(side * side * side) / time({{}, [&] { at::mm(a, b); }}).seconds;
  std::cout << nlohmann::json{{"device", device::name(device)}, {"copy_bytes_per_second", copy_}, {"product_flops_per_second", product_}, {"side", side}}.dump()
            << std::endl;
}

void Bench::rest() { scratch_.zero_(); }

Bench::Time Bench::time(const Way& way, int hidden_launches) {
  std::vector<std::pair<device::Moment, device::Moment>> runs;
  for (int i = 0; i < kWarmUp + kRepeats; ++i) {
    if (way.prepare) way.prepare();
    for (int launch = 0; launch < hidden_launches; launch += 10) rest();
    const device::Moment begin(device);
    way.run();
    const device::Moment end(device);
    if (i >= kWarmUp) runs.emplace_back(begin, end);
  }
  device::synchronize(device);
  std::vector<double> seconds;
  for (const auto& [begin, end] : runs) seconds.push_back(begin.seconds_until(end));
  std::sort(seconds.begin(), seconds.end());
  const double median = seconds[kRepeats / 2];
  return {median, (seconds[kRepeats * 9 / 10] - seconds[kRepeats / 10]) / 2 / median};
}

void Bench::tell(const std::string& shape, const std::string& op, Work work, Time ours, std::optional<Time> plain) const {
  nlohmann::ordered_json line{{"shape", shape}, {"op", op}, {"seconds", ours.seconds}, {"spread", ours.spread}, {"bytes", work.bytes},
                              {"flops", work.flops}, {"bound_seconds", bound(work)}, {"share_of_bound", bound(work) / ours.seconds}};
  if (plain) line["plain_seconds"] = plain->seconds;
  std::cout << line.dump() << std::endl;
}

void Bench::measure(const std::string& shape, const std::string& op, Work work, const Way& ours, const std::optional<Way>& plain) {
  const Time time_of_ours = time(ours);
  tell(shape, op, work, time_of_ours, plain ? std::optional(time(*plain)) : std::nullopt);
}

void Bench::measure(const std::string& shape, const std::string& op, Work forward, Work backward, const Differentiable& ours,
                    const std::optional<Differentiable>& plain) {
  const auto forget = [](const Differentiable& way) {
    for (const Tensor& input : way.inputs) input.mutable_grad() = Tensor();
  };
  // What a run makes is freed outside of the time: it may be much.
  std::vector<Tensor> y;
  const auto forward_of = [&](const Differentiable& way) { return Way{[&] { y.clear(); }, [&] { y = way.forward(); }}; };
  measure(shape, op + ", forward", forward, forward_of(ours), plain ? std::optional(forward_of(*plain)) : std::nullopt);
  std::vector<Tensor> dy;
  const auto backward_of = [&](const Differentiable& way) {
    return Way{[&] {
                 forget(way);
                 y = way.forward();
                 if (dy.empty()) std::transform(y.begin(), y.end(), std::back_inserter(dy), [](const Tensor& each) { return at::randn_like(each); });
               },
               [&] { torch::autograd::backward(y, dy); }};
  };
  measure(shape, op + ", backward", backward, backward_of(ours), plain ? std::optional(backward_of(*plain)) : std::nullopt);
  forget(ours);
  if (plain) forget(*plain);
}

Tensor Bench::draw(const std::vector<int64_t>& shape, at::ScalarType dtype) const {
  return at::randn(shape, at::TensorOptions(dtype).device(device));
}

Parameter Bench::weight(const std::vector<int64_t>& shape, at::ScalarType dtype) const {
  Parameter parameter;
  parameter.value = draw(shape, dtype).mul_(0.02);
  parameter.main_grad = at::zeros(shape, at::TensorOptions(at::kFloat).device(device));
  return parameter;
}

}  // namespace upcycle::bench
