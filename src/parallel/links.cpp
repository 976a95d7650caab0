#include "parallel/links.hpp"

#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <algorithm>
#include <array>
#include <chrono>

#include "base/error.hpp"
#include "device/device.hpp"

namespace upcycle::links {
namespace {

/// Seconds that `action` takes on the slower of the ranks, the device's work included.
template <class Action>
double seconds_of(const Communicator& group, c10::Device device, const Action& action) {
  device::synchronize(device);
  group.barrier();
  const auto begin = std::chrono::steady_clock::now();
  action();
  device::synchronize(device);
  const auto taken = std::chrono::steady_clock::now() - begin;
  return static_cast<double>(group.all_reduce(std::chrono::duration_cast<std::chrono::nanoseconds>(taken).count(), Reduce::max)) / 1e9;
}

/// The least that takes, of bytes that are measured after a smaller try, and cut to what takes about a second.
template <class Action>
double best_speed(const Communicator& group, c10::Device device, int64_t bytes, const Action& action) {
  const int64_t small = bytes / 16;
  seconds_of(group, device, [&] { action(small); });   // connects
  const double first = seconds_of(group, device, [&] { action(small); });
  const int64_t size = first > 0.06 ? small : bytes;   // the same on all ranks
  double least = first * static_cast<double>(size) / static_cast<double>(small);
  if (first < 1) {
    for (int repeat = 0; repeat < 3; ++repeat) least = std::min(least, seconds_of(group, device, [&] { action(size); }));
  }
  return static_cast<double>(size) / least / 1e9;
}

}  // namespace

std::vector<std::vector<std::pair<int, int>>> ring_rounds(int nodes) {
  std::vector<std::vector<std::pair<int, int>>> rounds;
  if (nodes < 2) return rounds;
  for (const int first : {0, 1}) {
    std::vector<std::pair<int, int>> round;
    for (int node = first; node + 1 < nodes; node += 2) round.emplace_back(node, node + 1);
    if (first == 1 && nodes % 2 == 0 && nodes > 2) round.emplace_back(nodes - 1, 0);
    if (!round.empty()) rounds.push_back(std::move(round));
  }
  if (nodes % 2 == 1) rounds.push_back({{nodes - 1, 0}});
  return rounds;
}

double exchange_speed(const Communicator& pair, c10::Device device) {
  constexpr int64_t kBytes = int64_t{64} << 20;
  if (pair.size() != 2) throw std::logic_error(text("a pair of ", pair.size(), " ranks"));
  const Tensor sent = at::zeros({kBytes}, at::TensorOptions(at::kByte).device(device)), received = at::zeros_like(sent);
  return best_speed(pair, device, kBytes, [&](int64_t bytes) {
    const std::array<Communicator::Message, 1> to{{{1 - pair.rank(), sent.narrow(0, 0, bytes)}}}, from{{{1 - pair.rank(), received.narrow(0, 0, bytes)}}};
    pair.send_receive(to, from);
  });
}

double all_reduce_speed(const Communicator& world, c10::Device device) {
  const int64_t bytes = device.is_cuda() ? int64_t{256} << 20 : int64_t{16} << 20;
  const Tensor x = at::zeros({bytes / 4}, at::TensorOptions(at::kFloat).device(device));
  const double speed = best_speed(world, device, bytes, [&](int64_t part) {
    Tensor some = x.narrow(0, 0, part / 4);
    world.all_reduce(some);
  });
  return speed * 2 * (world.size() - 1) / world.size();
}

}  // namespace upcycle::links
