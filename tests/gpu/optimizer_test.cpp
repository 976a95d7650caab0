// AdamW over flat buffers and the squared norm on a GPU: the numbers of ATen's fused kernel, and what is around them.
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>

#include "model/stage.hpp"
#include "ops/adamw.hpp"
#include "ops/sums_of_squares.hpp"
#include "parallel/mesh.hpp"
#include "support/decided_weights.hpp"
#include "support/gpu_time.hpp"
#include "support/no_waiting.hpp"
#include "support/numbers.hpp"
#include "support/tensors.hpp"
#include "train/optimizer.hpp"
#include "train/start.hpp"

namespace upcycle {
namespace {

const at::Device kGpu(at::kCUDA, 0);
constexpr AdamW kSettings = {.lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1};

Tensor scalar(double value) { return at::full({}, value, at::TensorOptions(at::kFloat).device(kGpu)); }

/// The most steps from one fp32 number to the next that lie between a and b; and how many numbers differ at all.
struct Ulps {
  int64_t most = 0, differing = 0;
  Ulps(const Tensor& a, const Tensor& b) {
    const auto ordered = [](const Tensor& x) {   // so that neighbours differ by one, also across zero
      const Tensor bits = x.cpu().contiguous().view(at::kInt).to(at::kLong);
      return bits.where(bits.ge(0), -(bits.bitwise_and(0x7fffffff)));
    };
    const Tensor apart = (ordered(a) - ordered(b)).abs();
    if (apart.numel() > 0) most = apart.max().item<int64_t>(), differing = apart.ne(0).sum().item<int64_t>();
  }
};

struct Flat {
  Tensor master, gradient, m, v, values;
  Flat(int64_t size, const std::vector<AdamWRun>& runs, at::ScalarType value) {
    const Tensor inside = at::zeros({size});
    for (const AdamWRun& run : runs) inside.narrow(0, run.begin, run.end - run.begin).fill_(1.0);
    const auto draw = [&](uint64_t seed) { return normal({size}, seed) * inside; };
    master = draw(1).to(kGpu), gradient = draw(2).to(kGpu), m = (draw(3) * 0.1).to(kGpu), v = (draw(4) * 0.1).abs().to(kGpu);
    if (value == at::kBFloat16) values = at::zeros({size}, master.options().dtype(value));
  }
  AdamWBuffer buffer(const std::vector<AdamWRun>& runs) const { return {master, gradient, m, v, values, runs}; }
};

const std::vector<std::vector<AdamWRun>> kRuns = {
    {{0, 1, 1.0, true}},
    {{0, 37, 1.0, true}, {64, 100, 1.0, false}, {128, 131, 0.1, false}, {192, 256, 1.0, true}},
    {{0, 5000, 1.0, true}, {5056, 5057, 0.3, false}, {5120, 9000, 1.0, false}, {9024, 100003, 1.0, true}},
    {{64, 2048, 0.5, true}, {2048, 2052, 1.0, true}, {2052, 4100, 0.5, false}}};   // a part of a bucket begins where it likes

// Both kernels compute the same expressions in the same order: bit for bit, or within one step of fp32 if the compilers' choice of fused
// multiply-adds differs. The figures are printed.
TEST(AdamWOnGpu, HasTheNumbersOfAtensKernel) {
  for (const at::ScalarType value : {at::kBFloat16, at::kFloat}) {
    for (const auto& runs : kRuns) {
      const int64_t size = (runs.back().end + 63) / 64 * 64;
      const Flat ours(size, runs, value), theirs(size, runs, value);
      const AdamWBuffer flat = ours.buffer(runs), plain = theirs.buffer(runs);
      for (int step = 1; step <= 4; ++step) {
        SCOPED_TRACE(testing::Message() << size << " elements, step " << step);
        const double divisor = step % 2 == 0 ? 3.7 : 1.0;
        // From the same numbers each time: of one step's difference the next would make more.
        theirs.master.copy_(ours.master), theirs.m.copy_(ours.m), theirs.v.copy_(ours.v);
        const Tensor fresh = Flat(size, runs, value).gradient * (0.5 * step);
        ours.gradient.copy_(fresh), theirs.gradient.copy_(fresh);
        flat.step(kSettings, scalar(step), scalar(divisor), scalar(0));
        plain.step_written_out(kSettings, scalar(step), scalar(divisor), scalar(0));
        for (const auto& [name, a, b] : {std::tuple{"masters", ours.master, theirs.master}, {"first moments", ours.m, theirs.m}, {"second moments", ours.v, theirs.v}}) {
          const Ulps ulps(a, b);
          EXPECT_LE(ulps.most, 1) << name;
          if (ulps.most > 0) std::printf("%s: %lld of %lld differ from ATen's, by one step of fp32\n", name, static_cast<long long>(ulps.differing), static_cast<long long>(size));
        }
        if (value == at::kBFloat16) {
          EXPECT_TRUE(same_bits(ours.values.cpu(), ours.master.to(at::kBFloat16).cpu())) << "what copy_ rounds to";
        }
        EXPECT_TRUE(ours.gradient.equal(fresh)) << "gradients are left as they are";
      }
      for (const Tensor& x : {ours.master, ours.m, ours.v}) {   // what is between runs stays zero
        double outside = x.abs().sum(at::kDouble).item<double>();
        for (const AdamWRun& run : runs) outside -= x.narrow(0, run.begin, run.end - run.begin).abs().sum(at::kDouble).item<double>();
        EXPECT_NEAR(outside, 0.0, 1e-9 * static_cast<double>(size));
      }
    }
  }
}

TEST(AdamWOnGpu, SkippedChangesNothing) {
  const Flat x(9024, {{0, 9000, 1.0, true}}, at::kBFloat16);
  const std::vector<Tensor> before = {x.master.clone(), x.m.clone(), x.v.clone(), x.values.clone()};
  x.gradient.fill_(NAN);
  x.buffer({{0, 9000, 1.0, true}}).step(kSettings, scalar(3), scalar(NAN), scalar(1));
  EXPECT_TRUE(x.master.equal(before[0]) && x.m.equal(before[1]) && x.v.equal(before[2]) && x.values.equal(before[3]));
}

// Pointers that no vector fits, and sizes that no vector ends at.
TEST(AdamWOnGpu, TakesAnyAddressAndSize) {
  for (const int64_t size : {1, 3, 4, 5, 2047, 2048, 2049, 10007}) {
    for (const int64_t from : {0, 1, 2}) {
      const std::vector<AdamWRun> runs = {{0, size, 1.0, true}};
      const Flat whole(size + 2, {{0, size + 2, 1.0, true}}, at::kBFloat16);
      const auto part = [&](const Tensor& flat) { return flat.narrow(0, from, size); };
      std::vector<Tensor> plain;
      for (const Tensor& x : {whole.master, whole.gradient, whole.m, whole.v}) plain.push_back(part(x).clone());
      const Tensor master = whole.master.clone();
      AdamWBuffer(part(whole.master), part(whole.gradient), part(whole.m), part(whole.v), part(whole.values), runs).step(kSettings, scalar(2), scalar(1.5), scalar(0));
      adamw_step(kSettings, {plain[0]}, {plain[1]}, {plain[2]}, {plain[3]}, scalar(2), scalar(1.5), scalar(0));
      EXPECT_LE(Ulps(part(whole.master), plain[0]).most, 1) << size << " from " << from;
      EXPECT_TRUE(whole.master.narrow(0, 0, from).equal(master.narrow(0, 0, from))) << "nothing before";
      EXPECT_TRUE(whole.master.narrow(0, from + size, 2 - from).equal(master.narrow(0, from + size, 2 - from))) << "nothing behind";
    }
  }
}

TEST(SumsOfSquaresOnGpu, AreTheSumAndTheSameEachTime) {
  std::vector<Tensor> all;
  std::vector<double> shares;
  double expected = 0.0;
  for (const int64_t size : {1, 5, 64, 4096, 1000003, 0, 20000000}) {
    all.push_back((normal({size + 1}, 7) * 1e-3).to(kGpu).narrow(0, size % 2, size));   // odd ones begin at no multiple of 16 bytes
    shares.push_back(size % 2 == 0 ? 1.0 : 0.25);
    expected += shares.back() * all.back().to(at::kDouble).square().sum().item<double>();
  }
  const Tensor sums = sums_of_squares(all, shares);
  EXPECT_EQ(sums.scalar_type(), at::kDouble);
  EXPECT_NEAR(sums.sum().item<double>(), expected, 1e-7 * expected);
  EXPECT_NEAR(sums_of_squares_written_out(all, shares).sum().item<double>(), expected, 1e-4 * expected);
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(same_bits(sums_of_squares(all, shares).cpu(), sums.cpu()));
  all[4][1000002] = NAN;
  EXPECT_TRUE(std::isnan(sums_of_squares(all, shares).sum().item<double>()));
  all[4][1000002] = 0.0, all[6][0] = INFINITY;
  EXPECT_FALSE(std::isfinite(sums_of_squares(all, shares).sum().item<double>()));
}

/// A small model's optimizer, whose gradients come from the seed of the step.
struct Trained {
  Mesh mesh{Grid(ParallelSection{}, 1)};
  std::optional<Stage> stage;
  std::optional<Optimizer> optimizer;
  Trained(at::Device device, at::ScalarType compute) {
    Architecture a;
    a.hidden = 40, a.layers = 3, a.heads = 4, a.kv_heads = 2, a.head_dim = 10, a.ffn = 48, a.vocab = 97, a.tied = true;
    a.experts = 8, a.top_k = 2, a.expert_ffn = 24, a.dense_layers = {1};
    stage.emplace(a, Layout::even(mesh.grid(), a), mesh);
    stage->weights().allocate(compute, device);
    fill_masters(stage->weights(), decided_weights(3));
    OptimizerSection settings;
    settings.clip = 1.0, settings.weight_decay = 0.1;
    optimizer.emplace(stage->weights(), settings, /*router_lr_scale=*/0.3);
  }
  void add(int step) {
    uint64_t seed = 1000 * static_cast<uint64_t>(step);
    for (Weight& weight : stage->weights().all()) weight.parameter.sums().add_(normal(weight.shape, ++seed).to(weight.parameter.main_grad.device()));
  }
};

TEST(OptimizerOnGpu, IsTheCpusAlsoAfterBadSteps) {
  for (const at::ScalarType compute : {at::kFloat, at::kBFloat16}) {
    Trained cpu(at::kCPU, compute), gpu(kGpu, compute);
    for (int step = 1; step <= 6; ++step) {
      SCOPED_TRACE(step);
      for (Trained* place : {&cpu, &gpu}) {
        place->optimizer->zero_gradients();
        for (const Weight& weight : place->stage->weights().all()) {
          if (!weight.parameter.outdated) EXPECT_EQ(weight.parameter.main_grad.abs().sum().item<float>(), 0.0F) << weight.spec().name;
        }
        place->add(step);
        if (step == 3) place->stage->weights().all()[4].parameter.main_grad.fill_(NAN);
        if (step == 5) {   // a pass that came to nothing: its gradients must not be the next one's
          place->optimizer->zero_gradients();
          place->add(50);
        }
      }
      const Tensor a = cpu.optimizer->squared_norm_share(), b = gpu.optimizer->squared_norm_share();
      if (step == 3) {
        EXPECT_TRUE(std::isnan(b.item<double>()));
      } else {
        EXPECT_NEAR(b.item<double>(), a.item<double>(), 1e-5 * a.item<double>());
      }
      const Tensor wanted = at::full({}, step != 4, at::TensorOptions(at::kBool));
      cpu.optimizer->step(1e-2, a, wanted);
      gpu.optimizer->step(1e-2, b, wanted.to(kGpu));
      EXPECT_EQ(gpu.optimizer->updates().item<float>(), cpu.optimizer->updates().item<float>());
      for (size_t i = 0; i < cpu.stage->weights().all().size(); ++i) {
        const Weight& ours = gpu.stage->weights().all()[i];
        EXPECT_LE(distance(ours.parameter.master, cpu.stage->weights().all()[i].parameter.master), 2e-6) << ours.spec().name;
        EXPECT_TRUE(ours.parameter.value.equal(ours.parameter.master.to(ours.parameter.value.scalar_type()))) << ours.spec().name;
      }
    }
  }
}

TEST(OptimizerOnGpu, WaitsForNothing) {
  Trained gpu(kGpu, at::kBFloat16);
  gpu.add(1);
  gpu.optimizer->step(1e-2, gpu.optimizer->squared_norm_share());
  {
    const NoWaiting guard;
    gpu.optimizer->zero_gradients();
    for (Weight& weight : gpu.stage->weights().all()) weight.parameter.sums();
    gpu.optimizer->step(1e-2, gpu.optimizer->squared_norm_share());
  }
}

// Asserts nothing: figures for people, beside a copy's rate on the same card.
TEST(OptimizerOnGpu, Rates) {
  const at::TensorOptions whole = at::TensorOptions(at::kFloat).device(kGpu);
  const int64_t bucket = int64_t{1} << 25, buckets = 16;
  const double elements = static_cast<double>(bucket * buckets);
  std::vector<AdamWBuffer> flat;
  std::vector<Tensor> gradients;
  for (int64_t i = 0; i < buckets; ++i) {
    gradients.push_back(at::randn({bucket}, whole));
    flat.emplace_back(at::randn({bucket}, whole), gradients.back(), at::zeros({bucket}, whole), at::zeros({bucket}, whole),
                      at::zeros({bucket}, whole.dtype(at::kBFloat16)), std::vector<AdamWRun>{{0, bucket / 2, 1.0, true}, {bucket / 2, bucket / 2 + 2048, 1.0, false}, {bucket / 2 + 2048, bucket, 1.0, true}});
  }
  const Tensor from = at::zeros({bucket * 8}, whole), to = at::zeros({bucket * 8}, whole), step = scalar(3), one = scalar(1), zero = scalar(0);
  const double copy = 2e-12 * static_cast<double>(from.nbytes()) / seconds([&] { to.copy_(from); });
  std::printf("copy                    %5.2f TB/s\n", copy);
  const auto tell = [&](const char* what, double bytes, double time) {
    const double rate = 1e-12 * bytes * elements / time;
    std::printf("%-24s%5.2f TB/s, %3.0f %% of a copy; %6.2f ms for 4.89e9 parameters\n", what, rate, 100 * rate / copy, 1e3 * time / elements * 4.89e9);
  };
  tell("AdamW, 30 bytes", 30, seconds([&] { for (const AdamWBuffer& x : flat) x.step(kSettings, step, one, zero); }));
  tell("skipped, 16 bytes", 16, seconds([&] { for (const AdamWBuffer& x : flat) x.step(kSettings, step, one, one); }));
  tell("plain form, 32+6 bytes", 38, seconds([&] { for (const AdamWBuffer& x : flat) x.step_written_out(kSettings, step, one, zero); }));
  const std::vector<double> shares(gradients.size(), 1.0);
  tell("squared norm, 4 bytes", 4, seconds([&] { sums_of_squares(gradients, shares); }));
  tell("plain form, 4 bytes", 4, seconds([&] { sums_of_squares_written_out(gradients, shares); }));
}

}  // namespace
}  // namespace upcycle
