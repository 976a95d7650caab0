// convert and export take the memory of some blocks, whatever the model's size: while they run, a thread asks the kernel again and again
// how much anonymous and shared memory this process has.
#include <ATen/ops/empty.h>
#include <gtest/gtest.h>
#include <malloc.h>

#include <atomic>
#include <chrono>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>
#include <thread>

#include "base/rng.hpp"
#include "checkpoint/safetensors.hpp"
#include "support/scratch.hpp"
#include "train/convert.hpp"
#include "train/hf_export.hpp"
#include "upcycle/grow.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;
constexpr int64_t kMiB = 1 << 20;
constexpr int64_t kMargin = 120 * kMiB;   // beyond the program itself; the writer's own ring is 64 MiB of it

/// RssAnon + RssShmem, in bytes.
int64_t own_memory() {
  std::ifstream status("/proc/self/status");
  std::string line;
  int64_t bytes = 0;
  while (std::getline(status, line)) {
    if (line.starts_with("RssAnon:") || line.starts_with("RssShmem:")) bytes += std::stoll(line.substr(9)) * 1024;
  }
  return bytes;
}

class Peak {
 public:
  Peak() : before_(own_memory()), thread_([this] {
    while (!stop_) {
      most_ = std::max<int64_t>(most_, own_memory());
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }) {}
  ~Peak() { end(); }
  /// Bytes beyond what there was.
  int64_t end() {
    stop_ = true;
    if (thread_.joinable()) thread_.join();
    return most_ - before_;
  }
  int64_t most() const { return most_; }

 private:
  const int64_t before_;
  std::atomic<int64_t> most_ = 0;
  std::atomic<bool> stop_ = false;
  std::thread thread_;
};

Architecture dense_model() {
  Architecture a;
  a.hidden = 512, a.layers = 4, a.heads = 4, a.kv_heads = 4, a.head_dim = 64, a.ffn = 4096, a.vocab = 8192, a.tied = true;
  a.dtype = at::kBFloat16;
  return a;
}

void write_model(const fs::path& folder, const Architecture& architecture) {
  std::vector<SafetensorsItem> items;
  const std::vector<ParameterSpec> specs = catalogue(architecture);
  for (const ParameterSpec& spec : specs) items.push_back({spec.name, at::kBFloat16, spec.shape});
  SafetensorsWriter writer(folder, items, 1 << 30, {{"format", "pt"}});
  for (const ParameterSpec& spec : specs) {
    const Tensor value = at::empty(spec.shape, at::kBFloat16);
    auto* const bits = static_cast<uint16_t*>(value.data_ptr());
    for (int64_t i = 0; i < value.numel(); ++i) bits[i] = static_cast<uint16_t>(0x3c00 + i * 2654435761u % 0x300);   // some numbers near 0.01
    writer.write(value);
  }
  writer.finish();
  store(folder / "config.json", to_hf(architecture, nlohmann::json::object()).dump());
}

TEST(StreamMemory, ConvertAndExportTakeAFewBlocks) {
  mallopt(M_MMAP_THRESHOLD, 1 << 17);   // and stays there: malloc else keeps some 64 MiB of what was freed, which is no block of ours
  const Communicator world = Communicator::everyone();
  std::optional<Scratch> scratch;
  if (world.rank() == 0) scratch.emplace();
  const fs::path root = world.broadcast(scratch ? scratch->path().string() : "", 0);
  if (world.rank() == 0) write_model(root / "dense", dense_model());
  world.barrier();

  RunConfig run;
  run.source.model = (root / "dense").string();
  run.run.directory = (root / "copy").string();
  convert_to_checkpoint(run, world);   // LibTorch and HDF5 keep some 60 MiB from their first use on
  export_to_hf(root / "copy", root / "copied", {}, world);
  malloc_trim(0);
  run.run.directory = (root / "run").string();
  run.moe_given = true, run.moe.experts = 8, run.moe.top_k = 2;
  const auto measured = [&](const char* what, int64_t bytes, auto action) {
    const auto start = std::chrono::steady_clock::now();
    Peak peak;
    action();
    const int64_t grew = world.all_reduce(peak.end(), Reduce::max), most = world.all_reduce(peak.most(), Reduce::max);
    EXPECT_LT(grew, kMargin) << what;
    EXPECT_GT(bytes / world.size(), kMargin * 3 / 2) << what << ": a rank that held its share could not hide it";
    if (world.rank() != 0) return;
    std::cout << what << ": " << bytes / kMiB << " MiB written, most of a rank: " << grew / kMiB << " MiB beyond " << (most - grew) / kMiB << " MiB; "
              << std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() << " s\n";
  };
  const auto size = [&](const fs::path& folder) {
    int64_t bytes = 0;
    for (const auto& entry : fs::directory_iterator(folder)) bytes += static_cast<int64_t>(entry.is_regular_file() ? entry.file_size() : 0);
    return bytes;
  };
  const int64_t expected = 2 * (8 * 3 * 4 * 512 * 4096 + 4 * 4 * 256 * 512 + 8192 * 512);
  measured("convert", expected, [&] { convert_to_checkpoint(run, world); });
  EXPECT_GE(size(root / "run/checkpoints/step-00000000"), expected);
  measured("export", expected, [&] { export_to_hf(root / "run", root / "out", {}, world); });
  EXPECT_GE(size(root / "out"), expected);
  world.barrier();   // before rank 0 removes it
}

}  // namespace
}  // namespace upcycle
