// Upcycling straight into a layout takes the memory of a rank's own boxes: no rank ever holds the dense model or another rank's experts.
// The kernel is the judge: while a rank grows, it may not have more private memory (RLIMIT_DATA) than its own weights and a margin that
// is smaller than the dense model, smaller than another rank's experts.
#include <ATen/ops/empty.h>
#include <gtest/gtest.h>
#include <malloc.h>
#include <sys/resource.h>

#include <chrono>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "base/rng.hpp"
#include "checkpoint/safetensors.hpp"
#include "parallel/mesh.hpp"
#include "support/scratch.hpp"
#include "train/certify.hpp"
#include "train/dense_source.hpp"
#include "train/layout_check.hpp"
#include "train/start.hpp"

namespace upcycle {
namespace {

constexpr int64_t kMiB = 1 << 20;
constexpr int64_t kMargin = 4 * kMiB;            // of growing: one matrix of the source at a time, 2 MiB
constexpr int64_t kCertifyMargin = 40 * kMiB;    // of certifying: one dense feed-forward in fp32, 12 MiB, activations, logits

/// "VmData:    1234 kB" in bytes: private writable memory, which is what RLIMIT_DATA limits.
int64_t own_memory() {
  std::ifstream status("/proc/self/status");
  std::string line;
  while (std::getline(status, line)) {
    if (line.starts_with("VmData:")) return std::stoll(line.substr(7)) * 1024;
  }
  throw std::runtime_error("/proc/self/status has no VmData");
}

/// While one lives, this process can't have more than `bytes` of private memory: allocations beyond throw.
class MemoryLimit {
 public:
  explicit MemoryLimit(int64_t bytes) {
    getrlimit(RLIMIT_DATA, &before_);
    const rlimit limit{static_cast<rlim_t>(bytes), before_.rlim_max};
    if (setrlimit(RLIMIT_DATA, &limit) != 0) throw std::runtime_error("setrlimit");
  }
  ~MemoryLimit() { setrlimit(RLIMIT_DATA, &before_); }
  MemoryLimit(const MemoryLimit&) = delete;
  MemoryLimit& operator=(const MemoryLimit&) = delete;

 private:
  rlimit before_;
};

/// Nearly all of it is feed-forwards: 48 of 52 MiB in bf16.
Architecture dense_model() {
  Architecture a;
  a.hidden = 256, a.layers = 8, a.heads = 4, a.kv_heads = 4, a.head_dim = 64, a.ffn = 4096, a.vocab = 512, a.tied = true;
  a.dtype = at::kBFloat16;
  return a;
}

void write_model(const std::filesystem::path& folder, const Architecture& architecture) {
  std::vector<SafetensorsWriter::Item> items;
  const std::vector<ParameterSpec> specs = catalogue(architecture);
  for (const ParameterSpec& spec : specs) items.push_back({spec.name, at::kBFloat16, spec.shape});
  SafetensorsWriter writer(folder, items, 1 << 30, {{"format", "pt"}});
  for (const ParameterSpec& spec : specs) {
    const Tensor value = at::empty(spec.shape, at::kFloat);
    initialise(spec, whole(spec.shape), architecture, 7, value);
    writer.write(value);
  }
  writer.finish();
  store(folder / "config.json", to_hf(architecture, nlohmann::json::object()).dump());
}

struct Growth {
  int64_t elements = 0;    ///< of this rank's weights
  int64_t own = 0;         ///< bytes that they take: fp32 values, and gradients that nothing touches yet
  int64_t grown = -1;      ///< most bytes beyond those, while growing; -1: it did not fit
  int64_t certified = 0;   ///< and while certifying
};

/// Grows the source into 4 experts with `margin` bytes beyond this rank's own weights, and certifies them with `certify_margin`.
Growth grow_within_limit(const WeightSource& source, const ParallelSection& layout, int64_t margin, int64_t certify_margin = kCertifyMargin) {
  RunConfig run;
  run.moe_given = true, run.moe.experts = 4, run.moe.top_k = 2;
  run.train.precision = Precision::fp32;
  run.train.sequence = 64, run.train.global_batch = 8, run.train.micro_batch = 1;
  run.upcycle.certify_tokens = 128;
  run.parallel = layout;
  const Recipe recipe = make_recipe(source.architecture(), run);
  const std::vector<std::string> problems = check_layout(run, recipe.moe, world_size()).problems;
  if (!problems.empty()) throw std::logic_error(problems.front());
  Mesh mesh(Grid(layout, world_size()));
  mesh.prepare(at::kCPU, Transport::automatic);
  const Sampler tokens({{1.0, "mock"}}, {1, 0, 0}, Split::train, run.train.sequence, recipe.moe.vocab, 1);
  const ReadDense read = [&](const std::string& name, const Box& box) { return source.read(name, box); };
  Stage stage(recipe.moe, make_layout(recipe.moe, mesh.grid(), layout), mesh, model_settings(run));
  Growth growth;
  for (const Weight& weight : stage.weights().all()) growth.elements += elements(weight.shape);
  malloc_trim(0);
  const int64_t empty = own_memory();
  stage.weights().allocate(at::kFloat, at::kCPU, /*zero=*/1);
  const int64_t before = own_memory();
  growth.own = before - empty;
  const auto look = [&](int64_t& most) { most = std::max(most, own_memory() - before); };
  bool fits = true;
  {
    const MemoryLimit limit(before + margin);
    try {
      fill_masters(stage.weights(), grown(recipe, read), [&] { look(growth.grown); });
    } catch (const std::exception&) {   // LibTorch's allocator, or bad_alloc
      fits = false;
    }
  }
  fits = mesh.world().all_reduce(int64_t{fits}, Reduce::min) == 1;
  if (!fits) {
    growth.grown = -1;
    return growth;
  }
  const MemoryLimit limit(before + certify_margin);
  const Certificate certificate = certify(stage, mesh, recipe, read, tokens, run, [&] { look(growth.certified); });
  EXPECT_TRUE(certificate.passed()) << certificate.table();
  return growth;
}

ParallelSection layout_of(int64_t tensor, int64_t pipeline, int64_t expert, int64_t expert_tensor) {
  ParallelSection p;
  p.tensor = tensor, p.pipeline = pipeline, p.expert = expert, p.expert_tensor = expert_tensor;
  return p;
}

TEST(GrowMemory, RanksHoldTheirOwnBoxesOnly) {
  mallopt(M_MMAP_THRESHOLD, 1 << 17);   // and stays there: large blocks are never cut out of what was freed before
  const Communicator world = Communicator::everyone();
  std::optional<Scratch> scratch;
  std::string folder;
  if (world.rank() == 0) {
    scratch.emplace();
    folder = scratch->path().string();
    write_model(folder, dense_model());
  }
  folder = world.all_gather(folder).front();
  const WeightSource source(folder);
  int64_t dense_bytes = 0;
  for (const ParameterSpec& spec : catalogue(source.architecture())) dense_bytes += 2 * elements(spec.shape);
  ASSERT_GT(dense_bytes, kCertifyMargin);   // a rank that held the dense model, in bf16 even, could not hide it

  const std::vector<std::pair<const char*, ParallelSection>> layouts = {{"expert 4", layout_of(1, 1, 4, 1)},
                                                                        {"expert 2, expert_tensor 2", layout_of(2, 1, 2, 2)},
                                                                        {"tensor 4, expert_tensor 4", layout_of(4, 1, 1, 4)},
                                                                        {"pipeline 4", layout_of(1, 4, 1, 1)},
                                                                        {"pipeline 2, expert 2", layout_of(1, 2, 2, 1)}};
  grow_within_limit(source, layouts[0].second, 200 * kMiB, 200 * kMiB);   // LibTorch's libraries keep memory of their own from their first product on
  for (const auto& [name, layout] : layouts) {
    SCOPED_TRACE(name);
    const Growth growth = grow_within_limit(source, layout, kMargin);
    EXPECT_GE(growth.grown, 0) << "growing took more than this rank's weights, " << growth.own << " bytes, and " << kMargin;
    EXPECT_NEAR(growth.own, 8 * growth.elements, 8 * kMiB) << "the measure misses what was allocated";
    const auto most = [&](int64_t bytes) { return world.all_reduce(bytes, Reduce::max) / kMiB; };
    const int64_t own = most(growth.own), grew = most(growth.grown), certified = most(growth.certified);
    if (world.rank() == 0) {
      std::cout << text(name, ": most of any rank, MiB: own weights with gradients ", own, ", beyond them while growing ", grew,
                        ", while certifying ", certified, " (dense model in bf16: ", dense_bytes / kMiB, ")\n");
    }
  }
  // The limit is one: the matrices that growing reads, one at a time, do not fit into less than one.
  EXPECT_EQ(grow_within_limit(source, layout_of(1, 1, 4, 1), kMiB).grown, -1);
  world.barrier();   // before rank 0 removes the source
}

}  // namespace
}  // namespace upcycle
