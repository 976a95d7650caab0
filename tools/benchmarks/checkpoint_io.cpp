// Saves, loads and verifies a model's training state beside plain files of the same bytes: what tools/bench checkpoint runs, on several ranks.
//   checkpoint_io RUN.toml DIRECTORY REPEATS [streamed]   RUN.toml: run.device, architecture, [moe], [parallel], [checkpoint]; prints one JSON line a repeat
// streamed: as where host memory has no room for a copy.
#include <fcntl.h>
#include <malloc.h>
#include <sys/resource.h>
#include <unistd.h>

#include <ATen/ops/randn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iostream>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/error.hpp"
#include "checkpoint/durable.hpp"
#include "cli/verify.hpp"
#include "config/run_config.hpp"
#include "device/device.hpp"
#include "train/saver.hpp"
#include "train/setup.hpp"
#include "train/start.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;
constexpr int64_t kPiece = int64_t{4} << 20;

class Stopwatch {
 public:
  explicit Stopwatch(const Communicator& world) : world_(world) { world.barrier(); }
  /// Until the last rank is here.
  double seconds() const {
    world_.barrier();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  const Communicator& world_;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

/// Bytes of this process that are in no file.
int64_t anonymous_bytes() {
  std::ifstream status("/proc/self/status");
  for (std::string key, rest; status >> key && std::getline(status, rest);) {
    if (key == "RssAnon:") return std::stoll(rest) * 1024;
  }
  return 0;
}

/// Watches this process's memory on a thread of its own.
class PeakWatch {
 public:
  PeakWatch() : start_((malloc_trim(0), anonymous_bytes())), thread_([this] {
    while (!done_) peak_ = std::max(peak_.load(), anonymous_bytes()), std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }) {}
  ~PeakWatch() { done_ = true, thread_.join(); }
  int64_t extra() const { return std::max<int64_t>(0, peak_ - start_); }

 private:
  const int64_t start_;
  std::atomic<int64_t> peak_ = 0;
  std::atomic<bool> done_ = false;
  std::thread thread_;
};

void forget_cached(const fs::path& path) {
  const FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  ::fsync(file.get());
  ::posix_fadvise(file.get(), 0, 0, POSIX_FADV_DONTNEED);
}

/// A rank's share of a checkpoint's bytes, in memory as a plain program has them: what lies in a few pages is written faster. Where a quarter of
/// the host's free memory does not hold the shares of all ranks, as much of this one's as fits, to be taken again and again.
class PlainBytes {
 public:
  PlainBytes(const fs::path& step, const Manifest& manifest, const Range& share, int ranks) {
    const int64_t room = static_cast<int64_t>(available_host_memory()) / 4 / ranks;
    pieces_ = std::clamp((share.size() + kPiece - 1) / kPiece, int64_t{1}, std::max<int64_t>(1, room / kPiece));
    memory_.reset(static_cast<std::byte*>(std::aligned_alloc(kPiece, static_cast<size_t>(pieces_ * kPiece))));
    if (!memory_) fail("no memory for ", pieces_ * kPiece, " bytes");
    read(step, manifest, {share.begin, std::min(share.end, share.begin + pieces_ * kPiece)});
  }
  /// Piece `number` of the share.
  std::span<std::byte> piece(int64_t number) const { return {memory_.get() + number % pieces_ * kPiece, static_cast<size_t>(kPiece)}; }

  /// Reads `share` of a checkpoint's bytes, its files one after another in the manifest's order.
  void read(const fs::path& step, const Manifest& manifest, const Range& share) const {
    int64_t file_begin = 0;
    for (const auto& [name, size] : manifest.files.items()) {
      const int64_t file_end = file_begin + size.get<int64_t>(), end = std::min(share.end, file_end);
      const FileDescriptor file(::open((step / name).c_str(), O_RDONLY | O_CLOEXEC));
      for (int64_t from = std::max(share.begin, file_begin), next; from < end; from = next) {
        const int64_t in_share = from - share.begin, in_piece = in_share % kPiece;
        next = std::min(end, from + kPiece - in_piece);
        read_at(file, piece(in_share / kPiece).subspan(static_cast<size_t>(in_piece), static_cast<size_t>(next - from)), static_cast<uint64_t>(from - file_begin),
                step / name);
      }
      file_begin = file_end;
    }
  }

 private:
  struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  int64_t pieces_ = 0;
  std::unique_ptr<std::byte, Free> memory_;
};

/// Each rank `bytes` into a part of one new file of its own region, whole pieces, then fsync: what a plain program does.
double plain_write(const fs::path& path, const Communicator& world, int64_t bytes, const PlainBytes& memory, int flags) {
  const std::vector<int64_t> all = world.all_gather(bytes);
  int64_t begin = 0;
  for (int rank = 0; rank < world.rank(); ++rank) begin += (all[static_cast<size_t>(rank)] + kPiece - 1) / kPiece * kPiece;
  const Stopwatch watch(world);
  const FileDescriptor file(::open(path.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC | flags, 0644));
  if (!file) fail_with_errno("opening", path);
  for (int64_t done = 0; done < bytes; done += kPiece) write_at(file, memory.piece(done / kPiece), static_cast<uint64_t>(begin + done), path);
  ::fsync(file.get());
  return watch.seconds();
}

/// Each rank its share of the checkpoint's own files, plainly.
double plain_read(const fs::path& step, const Manifest& manifest, const Communicator& world, const Range& share, const PlainBytes& memory) {
  const Stopwatch watch(world);
  memory.read(step, manifest, share);
  return watch.seconds();
}

int save_and_load(const std::string& run_file, const fs::path& directory, int repeats, bool streamed) {
  const RunConfig config = read_run(run_file);
  const c10::Device device = device::choose(config.run.device, host_rank());
  const Mesh mesh(Grid(config.parallel, world_size()));
  const Communicator& world = mesh.world();
  const Architecture dense = read_architecture(config.source.architecture);
  const Architecture architecture = choose_target(config, dense, false).architecture;
  const at::ScalarType compute = compute_dtype(config.train.precision);
  const auto layout = make_layout(architecture, mesh.grid(), config.parallel);
  const auto make = [&] { return std::make_unique<Stage>(architecture, layout, mesh); };
  std::unique_ptr<Stage> stage = make();
  stage->weights().allocate(compute, device, config.parallel.zero);
  fill_masters(stage->weights(), [](const ParameterSpec&, const Box& box, Tensor target) { target.copy_(at::randn(box.size)); });   // rounds: masters are stored
  std::optional<Optimizer> optimizer(std::in_place, stage->weights(), OptimizerSection{}, 1.0);
  for (size_t i = 0; i < stage->weights().buckets().size(); ++i) {
    for (Tensor* moment : {&optimizer->exp_avg(i), &optimizer->exp_avg_sq(i)}) moment->copy_(at::randn(moment->sizes()));
  }
  RunRecord record{"bench", to_hf(architecture, nlohmann::json::object()), nlohmann::json::object(), nlohmann::json::object(), {}};
  std::optional<PlainBytes> memory;

  const fs::path run = directory / "run", plain = directory / "plain", step = run / step_directory(1);
  int64_t bytes = 0;   // of the checkpoint
  Range share;         // of those, this rank's
  Manifest manifest;
  const auto write_plain = [&](int flags) {
    if (world.rank() == 0) fs::remove(plain);
    return plain_write(plain, world, share.size(), *memory, flags);
  };
  std::vector<nlohmann::json> repeats_told;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    if (world.rank() == 0) fs::remove_all(run), fs::remove(plain);
    nlohmann::json& told = repeats_told.emplace_back(nlohmann::json{{"ranks", world.size()}, {"repeat", repeat}});
    const auto save = [&] {
      device::synchronize(device);
      Saver saver(run, mesh, config.checkpoint, [] {}, [=] { return streamed ? 0 : available_host_memory(); }, device);
      const PeakWatch peak;
      const Stopwatch taking(world);   // behind the first steps of a run
      saver.take_memory(stage->weights(), *optimizer);
      while (saver.takes_memory()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      told["memory_seconds"] = taking.seconds();
      const Stopwatch watch(world);
      saver.save(stage->weights(), &*optimizer, {1, 1, 0}, record, false);
      told["stall_seconds"] = watch.seconds();
      saver.before_update();
      told["update_waits_seconds"] = watch.seconds();
      saver.finish();
      told["save_seconds"] = watch.seconds();
      told["save_extra_bytes"] = world.all_reduce(peak.extra(), Reduce::max);
      bytes = 0;
      manifest = read_manifest(step);
      for (const auto& [file, size] : manifest.files.items()) bytes += size.get<int64_t>();
      share = {bytes * world.rank() / world.size(), bytes * (world.rank() + 1) / world.size()};
      if (!memory) memory.emplace(step, manifest, share, world.size());
    };
    // Disks have moods: each comes first as often as last.
    if (repeat % 2 == 0) save();
    told["plain_direct_write_seconds"] = write_plain(O_DIRECT);
    if (repeat % 2 == 1) save();
    told["bytes"] = bytes;
    const auto forget_step = [&] {
      if (world.rank() != 0) return;
      for (const auto& file : fs::directory_iterator(step)) forget_cached(file.path());
    };
    const auto load = [&] {
      forget_step();
      const PeakWatch peak;
      const Stopwatch watch(world);
      restore_checkpoint(CheckpointReader(step), stage->weights(), &*optimizer);
      device::synchronize(device);
      told["load_seconds"] = watch.seconds();
      told["load_extra_bytes"] = world.all_reduce(peak.extra(), Reduce::max);
    };
    const auto check = [&] {
      forget_step();
      const Stopwatch watch(world);
      const Verification found = verify(CheckpointReader(step), world);
      told["verify_seconds"] = watch.seconds();
      if (!found.problems.empty()) fail(step.string(), ": ", found.problems.front());
    };
    const auto read = [&] {
      forget_step();
      told["plain_read_seconds"] = plain_read(step, manifest, world, share, *memory);
    };
    const std::array<std::function<void()>, 3> readers = {load, read, check};
    for (int i = 0; i < 3; ++i) readers[static_cast<size_t>((repeat + i) % 3)]();
  }
  // Through the page cache: last of all, since a disk whose caches that has filled is slow for a while, for whatever comes next.
  for (size_t repeat = 0; repeat < std::min<size_t>(repeats_told.size(), 2); ++repeat) repeats_told[repeat]["plain_write_seconds"] = write_plain(0);
  for (const nlohmann::json& told : repeats_told) {
    if (world.rank() == 0) std::cout << told.dump() << std::endl;
  }
  return 0;
}

}  // namespace
}  // namespace upcycle

int main(int argc, char** argv) {
  upcycle::MpiSession session(&argc, &argv);
  try {
    const bool streamed = argc == 5 && std::string(argv[4]) == "streamed";
    if (argc != 4 && !streamed) upcycle::fail("usage: checkpoint_io RUN.toml DIRECTORY REPEATS [streamed]");
    return upcycle::save_and_load(argv[1], argv[2], std::stoi(argv[3]), streamed);
  } catch (const std::exception& error) {
    std::cerr << "checkpoint_io: " << error.what() << std::endl;
    upcycle::abort_all_ranks(2);
  }
}
