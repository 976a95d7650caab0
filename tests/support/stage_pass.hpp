#pragma once
#include <ATen/ops/arange.h>
#include <c10/core/CPUAllocator.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "model/stage.hpp"
#include "support/numbers.hpp"
#include "support/tensors.hpp"

namespace upcycle {

/// LibTorch's allocator of the CPU, counting.
class Counting final : public c10::Allocator {
 public:
  Counting() { c10::SetCPUAllocator(this, /*priority=*/100); }
  at::DataPtr allocate(size_t bytes) override {
    char* const base = static_cast<char*>(inner_->raw_allocate(bytes + kHeader));
    *reinterpret_cast<int64_t*>(base) = static_cast<int64_t>(bytes);
    live += static_cast<int64_t>(bytes);
    peak = std::max(peak, live);
    return {base + kHeader, base + kHeader, release, at::Device(at::kCPU)};   // kernels that pack for matrix units want the address itself
  }
  at::DeleterFnPtr raw_deleter() const override { return release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  static inline int64_t live = 0, peak = 0;

 private:
  static constexpr size_t kHeader = 64;   // keeps LibTorch's alignment; holds the size
  static void release(void* data) {
    char* const base = static_cast<char*>(data) - kHeader;
    live -= *reinterpret_cast<int64_t*>(base);
    inner_->raw_deallocate(base);
  }
  static inline c10::Allocator* inner_ = c10::GetCPUAllocator();
};

inline Counting& counting() {
  static auto* const allocator = new Counting;   // what it gave may outlive everything
  return *allocator;
}

inline Architecture architecture_of(bool moe) {
  Architecture a;
  a.hidden = 32, a.layers = 3, a.heads = 4, a.kv_heads = 2, a.head_dim = 16, a.ffn = 48, a.vocab = 96, a.tied = false;
  if (moe) a.experts = 8, a.top_k = 2, a.expert_ffn = 24, a.renormalise = true, a.dense_layers = {1};
  return a;
}

struct PassOutcome {
  Tensor y, dx;
  std::vector<Tensor> gradients;
  std::vector<int64_t> additions;
  std::vector<Tensor> counts;
  int64_t kept = 0, peak = 0;   ///< bytes that forward leaves for backward; the most at any time of both
};

/// Two micro-batches through the layers of a small model and back, on this rank of `degrees`.
inline PassOutcome pass(const Architecture& architecture, const ParallelSection& degrees, const ModelSettings& settings,
                    at::ScalarType dtype = at::kFloat) {
  counting();
  const Mesh mesh(Grid(degrees, world_size()));
  Stage stage(architecture, Layout::even(mesh.grid(), architecture), mesh, settings);
  stage.weights().allocate(dtype, at::kCPU);
  uint64_t seed = 10;
  for (Weight& weight : stage.weights().all()) {
    const bool norm = weight.spec().role == Role::norm;
    weight.parameter.master.copy_(norm ? 1 + 0.2 * normal(weight.shape, ++seed) : 0.2 * normal(weight.shape, ++seed));
  }
  stage.weights().publish();
  const int64_t sequences = 2, length = 32, rows = sequences * length / mesh.grid().size(Axis::sequence);
  const Positions positions = stage.positions(sequences, length);
  RouterContext context{.balance = {.aux = 0.05, .z = 0.01}};
  context.token_T = at::arange(rows) + rows * mesh.here()[Axis::sequence];
  PassOutcome outcome;
  seed = 100 + 10 * static_cast<uint64_t>(world_rank());
  for (uint64_t pass = 0; pass < 2; ++pass) {
    const Tensor x = normal({rows, architecture.hidden}, seed + 3 + pass, dtype).requires_grad_();
    const Tensor dy = normal({rows, architecture.hidden}, seed + 5 + pass, dtype);
    const int64_t before = Counting::live;
    Counting::peak = before;
    const Tensor y = stage.blocks(x, positions, context);
    outcome.kept = Counting::live - before;
    run_backward(y, dy);
    outcome.peak = Counting::peak - before;
    outcome.y = y.detach(), outcome.dx = x.grad();
  }
  for (Weight& weight : stage.weights().all()) {
    outcome.gradients.push_back(weight.parameter.main_grad);
    outcome.additions.push_back(weight.parameter.additions);
  }
  for (Router* router : stage.routers()) {
    outcome.counts.push_back(router->statistics().count_E);
    outcome.counts.push_back(router->statistics().measures_3);
    outcome.counts.push_back(router->statistics().dropped);
  }
  return outcome;
}

inline void expect_same_bits(const PassOutcome& a, const PassOutcome& b) {
  EXPECT_TRUE(same_bits(a.y, b.y));
  EXPECT_TRUE(same_bits(a.dx, b.dx));
  for (size_t i = 0; i < a.gradients.size(); ++i) EXPECT_TRUE(same_bits(a.gradients[i], b.gradients[i])) << "weight " << i;
  EXPECT_EQ(a.additions, b.additions);
  ASSERT_EQ(a.counts.size(), b.counts.size());
  for (size_t i = 0; i < a.counts.size(); ++i) EXPECT_TRUE(same_bits(a.counts[i], b.counts[i])) << "statistics " << i;
}

}  // namespace upcycle
