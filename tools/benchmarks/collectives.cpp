// Times what moves between ranks, by Communicator as in training, and what has to be done before anything can move. tools/bench scaling starts
// it on several ranks; rank 0 prints lines of JSON.
//   collectives start-up cpu|cuda              until all communicators of a data-parallel run have been used; LAUNCHED: seconds since 1970 at
//                                              which the launcher was started
//   collectives bandwidth cpu|cuda BYTES...    every collective at each size
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <functional>
#include <iostream>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "device/device.hpp"
#include "device/moment.hpp"
#include "parallel/mesh.hpp"

namespace upcycle {
namespace {

using Json = nlohmann::ordered_json;

/// Seconds since 1970: the launcher is another process.
double now() { return std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count(); }

double slowest(const Communicator& group, double seconds) {
  return static_cast<double>(group.all_reduce(static_cast<int64_t>(seconds * 1e9), Reduce::max)) / 1e9;
}

void tell(const Json& line) {
  if (world_rank() == 0) std::cout << line.dump() << std::endl;
}

Mesh data_parallel(at::Device device) {
  Mesh mesh(Grid(ParallelSection{}, world_size()));
  mesh.prepare(device, device.is_cuda() ? Transport::nccl : Transport::automatic);
  return mesh;
}

/// `begun`: main's first moment, `connected`: MPI's. A part's seconds are those of the rank for which it took longest.
void start_up(const std::string& wish, double begun, double connected) {
  const char* launched = std::getenv("LAUNCHED");
  if (!launched) fail("LAUNCHED is not set");
  const at::Device device = device::choose(wish, host_rank());
  Tensor x = at::ones({1 << 20}, at::TensorOptions(at::kFloat).device(device));
  device::synchronize(device);
  const double awake = now();
  const Mesh mesh = data_parallel(device);
  const double joined = now();
  for (int axis = 0; axis < kAxes; ++axis) mesh.along(static_cast<Axis>(axis)).all_reduce(x);
  device::synchronize(device);
  const double talked = now();
  const Communicator& world = mesh.world();
  tell({{"start_up",
         {{"process", slowest(world, begun - std::atof(launched))},
          {"mpi", slowest(world, connected - begun)},
          {"device", slowest(world, awake - connected)},
          {"communicators", slowest(world, joined - awake)},
          {"first_use", slowest(world, talked - joined)},
          {"all", slowest(world, talked - std::atof(launched))}}},
        {"ranks", world.size()},
        {"transport", mesh.transport()}});
}

class Stopwatch {
 public:
  Stopwatch(const Communicator& group, at::Device device) : group_(group), device_(device) {
    if (device.is_cuda()) busy_ = at::empty({int64_t{1} << 30}, at::TensorOptions(at::kByte).device(device));
  }

  /// Seconds of one `run`, the slowest rank's: the median over rounds of many in a row. The ranks meet in untimed ones, and on a GPU the host
  /// is ahead, so that neither launches nor the barrier before count. `x` is drawn anew for each round, as sums grow.
  double seconds(Tensor& x, const std::function<void()>& run) const {
    constexpr int kMost = 20, kRounds = 5, kMeet = 3;
    constexpr double kLong = 0.05;
    x.uniform_(-1, 1);
    run();   // makes connections
    const double once = slowest(group_, of(1, run));
    const int times = std::clamp(static_cast<int>(kLong / std::max(once, 1e-9)), 1, kMost);
    std::vector<double> rounds;
    for (int round = 0; round < (times == 1 ? 3 : kRounds); ++round) {
      x.uniform_(-1, 1);
      group_.barrier();
      for (int i = 0; i < 4 && busy_.defined(); ++i) busy_.zero_();
      for (int i = 0; i < (times == 1 ? 0 : kMeet); ++i) run();
      rounds.push_back(slowest(group_, of(times, run)));
    }
    std::sort(rounds.begin(), rounds.end());
    return rounds[rounds.size() / 2];
  }

 private:
  double of(int times, const std::function<void()>& run) const {
    const device::Moment begin(device_);
    for (int i = 0; i < times; ++i) run();
    const device::Moment end(device_);
    device::synchronize(device_);
    return begin.seconds_until(end) / times;
  }

  const Communicator& group_;
  const at::Device device_;
  Tensor busy_;   ///< zeroing it keeps the GPU busy for a third of a millisecond
};

void bandwidth(const std::string& wish, const std::vector<int64_t>& sizes) {
  const at::Device device = device::choose(wish, host_rank());
  const Mesh mesh = data_parallel(device);
  const Communicator& group = mesh.along(Axis::data);
  const int64_t n = group.size();
  if (n == 1) fail("one rank has nobody to exchange anything with");
  const Stopwatch stopwatch(group, device);
  const int next = static_cast<int>((group.rank() + 1) % n), before = static_cast<int>((group.rank() + n - 1) % n);
  // Of a tensor of so many bytes a rank, what a link carries at least, as NCCL's tests count: their "bus bandwidth".
  const double part = static_cast<double>(n - 1) / static_cast<double>(n);

  const auto measure = [&](const char* operation, at::ScalarType dtype, double carried, const std::function<void(Tensor&)>& run) {
    for (const int64_t size : sizes) {
      const int64_t count = std::max<int64_t>(1, size / static_cast<int64_t>(c10::elementSize(dtype)) / n) * n;
      Tensor x = at::empty({count}, at::TensorOptions(dtype).device(device));
      const double seconds = stopwatch.seconds(x, [&] { run(x); });
      tell({{"operation", operation}, {"dtype", dtype == at::kFloat ? "fp32" : "bf16"}, {"bytes", x.nbytes()}, {"seconds", seconds},
            {"bus_bytes_per_second", carried * static_cast<double>(x.nbytes()) / seconds}, {"by", mesh.transport()}});
    }
  };
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    measure("all-reduce", dtype, 2 * part, [&](Tensor& x) { group.all_reduce(x); });
  }
  measure("reduce-scatter", at::kFloat, part, [&](Tensor& x) { group.reduce_into_own_part(x); });
  measure("reduce-scatter", at::kBFloat16, part, [&](Tensor& x) { group.reduce_scatter(x, 0); });
  measure("all-gather", at::kBFloat16, part, [&](Tensor& x) { group.gather_from_own_part(x); });
  measure("all-to-all", at::kBFloat16, part, [&](Tensor& x) {
    const auto rows = Communicator::one_each(std::vector<int64_t>(static_cast<size_t>(n), x.numel() / n));
    group.all_to_all(x, rows, rows);
  });
  Tensor received;
  measure("send + receive", at::kBFloat16, 1, [&](Tensor& x) {
    if (!received.defined() || received.numel() != x.numel()) received = at::empty_like(x);
    const std::array<Communicator::Message, 1> to{{{next, x}}}, from{{{before, received}}};
    group.send_receive(to, from);
  });
}

int run(const std::vector<std::string>& words, double begun, double connected) {
  if (words.size() == 2 && words[0] == "start-up") {
    start_up(words[1], begun, connected);
    return 0;
  }
  if (words.size() < 3 || words[0] != "bandwidth") fail("collectives start-up cpu|cuda, or collectives bandwidth cpu|cuda BYTES...");
  std::vector<int64_t> sizes;
  for (size_t i = 2; i < words.size(); ++i) sizes.push_back(std::stoll(words[i]));
  bandwidth(words[1], sizes);
  return 0;
}

}  // namespace
}  // namespace upcycle

int main(int argc, char** argv) {
  using namespace upcycle;
  const double begun = now();
  try {
    const MpiSession session(&argc, &argv);
    try {
      return run({argv + 1, argv + argc}, begun, now());
    } catch (const std::exception& error) {
      std::cerr << text("collectives: rank ", world_rank(), ": ", error.what(), '\n') << std::flush;
      abort_all_ranks(1);
    }
  } catch (const std::exception& error) {
    std::cerr << "collectives: " << error.what() << '\n';
    return 1;
  }
}
