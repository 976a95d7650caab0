#pragma once
#include <ATen/ops/empty.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <iomanip>
#include <map>

#include "base/error.hpp"
#include "support/layout_trials.hpp"
#include "support/tiny_training.hpp"

// The numbers that one rank gives for the tiny models, kept in files of UPCYCLE_REFERENCE_DIR, and a layout held against them.
namespace upcycle {

/// Two on a GPU: ranks that share one take turns at it, for milliseconds in each collective. The second step sees the first's parameters.
inline int64_t steps_on(at::Device device) { return device.is_cuda() ? 2 : 5; }

/// What one rank saw and made.
struct Reference {
  std::vector<StepReport> steps;
  std::map<std::string, Tensor> parameters;   ///< fp32, whole
};

inline std::filesystem::path folder_of(const TinyModel& m) { return std::filesystem::path(UPCYCLE_REFERENCE_DIR) / m.name; }

/// Visits every parameter that this rank holds a box of.
template <class Visit>
void for_each_part(Weights& weights, Visit&& visit) {
  for (Weight& weight : weights.all()) {
    for (const Part& part : weight.parts) visit(part, part.of(weight.parameter.arrived()));
  }
}

/// On one rank.
inline void make_reference(const TinyModel& m, at::Device device = at::kCPU) {
  TinyTraining training(m, m.run, device);
  std::filesystem::create_directories(folder_of(m));
  std::ofstream numbers(folder_of(m) / "steps.txt");
  numbers << std::setprecision(17);
  std::map<std::string, Tensor> before;
  for_each_part(training.stage().weights(), [&](const Part& part, const Tensor& value) { before.emplace(part.spec.name, value.clone()); });
  for (int64_t step = 0; step < steps_on(device); ++step) {
    EXPECT_GT(training.smallest_gap(m.tied_routers), 1e-5) << "a router chooses by a hair's breadth: take another seed";
    const StepReport report = training.step();
    ASSERT_FALSE(report.skipped);
    numbers << report.loss << ' ' << report.gradient_norm << ' ' << report.aux_loss << ' ' << report.z_loss << ' '
            << report.router_entropy << ' ' << report.dropped << '\n';
  }
  for_each_part(training.stage().weights(), [&](const Part& part, const Tensor& value) {
    const Tensor& old = before.at(part.spec.name);
    EXPECT_GT((value - old).norm().item<double>(), 2e-4 * old.norm().item<double>()) << part.spec.name << ": what does not move proves nothing";
    const Tensor whole = value.cpu().contiguous();
    std::ofstream file(folder_of(m) / part.spec.name, std::ios::binary);
    file.write(static_cast<const char*>(whole.const_data_ptr()), static_cast<std::streamsize>(whole.nbytes()));
  });
}

inline Reference load_reference(const TinyModel& m) {
  Reference reference;
  std::ifstream numbers(folder_of(m) / "steps.txt");
  for (StepReport s; numbers >> s.loss >> s.gradient_norm >> s.aux_loss >> s.z_loss >> s.router_entropy >> s.dropped;) {
    reference.steps.push_back(s);
  }
  for (const ParameterSpec& spec : catalogue(m.architecture)) {
    Tensor whole = at::empty(spec.shape, at::kFloat);
    std::ifstream file(folder_of(m) / spec.name, std::ios::binary);
    file.read(static_cast<char*>(whole.mutable_data_ptr()), static_cast<std::streamsize>(whole.nbytes()));
    if (!file) throw std::runtime_error("run this test on one rank first: it leaves " + (folder_of(m) / spec.name).string());
    reference.parameters.emplace(spec.name, whole);
  }
  return reference;
}

/// The tiny models that a layout is tried with: as many layers and sequences as it needs.
inline std::vector<TinyModel> models_for(const ParallelSection& p) { return tiny_models(depth_for(p, world_size())); }

/// The numbers of all tiny models: made here on one rank, else read.
class References {
 public:
  explicit References(at::Device device) {
    for (const int64_t depth : {4, 8}) {
      for (const TinyModel& m : tiny_models(depth)) {
        if (world_size() == 1) make_reference(m, device);
        references_.emplace(m.name, load_reference(m));
      }
    }
  }
  const Reference& of(const TinyModel& m) const { return references_.at(m.name); }

 private:
  std::map<std::string, Reference> references_;
};

inline std::string describe(const ParallelSection& p) {
  return text("tensor ", p.tensor, ", context ", p.context, ", pipeline ", p.pipeline, " x ", p.virtual_stages, ", expert ", p.expert,
              ", expert_tensor ", p.expert_tensor, ", zero ", p.zero);
}

/// **Collective** over the world. `bound`: relative, of losses and norms; parameters may be off by ten times that of their norm.
inline void expect_same(const TinyModel& m, const RunConfig& run, const Reference& reference, double bound = 1e-6,
                        at::Device device = at::kCPU, Transport transport = Transport::automatic) {
  TinyTraining training(m, run, device, transport);
  for (int64_t step = 0; step < steps_on(device); ++step) {
    SCOPED_TRACE(text("step ", step + 1));
    const StepReport ours = training.step();
    const StepReport& one = reference.steps.at(static_cast<size_t>(step));
    EXPECT_NEAR(ours.loss, one.loss, bound * one.loss);
    EXPECT_NEAR(ours.gradient_norm, one.gradient_norm, bound * one.gradient_norm);
    EXPECT_NEAR(ours.aux_loss, one.aux_loss, bound * one.aux_loss);
    EXPECT_NEAR(ours.z_loss, one.z_loss, bound * one.z_loss);
    EXPECT_NEAR(ours.router_entropy, one.router_entropy, bound * one.router_entropy);
    EXPECT_EQ(ours.dropped, one.dropped);
    EXPECT_EQ(ours.tokens_per_expert.size(), static_cast<size_t>(m.architecture.num_moe_layers()));
  }
  for_each_part(training.stage().weights(), [&](const Part& part, const Tensor& value) {
    const Tensor& whole = reference.parameters.at(part.spec.name);
    Tensor box = whole;
    for (size_t d = 0; d < part.box.begin.size(); ++d) box = box.narrow(static_cast<int64_t>(d), part.box.begin[d], part.box.size[d]);
    EXPECT_LE((value.cpu() - box).norm().item<double>(), 10 * bound * whole.norm().item<double>()) << part.spec.name;
  });
}

}  // namespace upcycle
