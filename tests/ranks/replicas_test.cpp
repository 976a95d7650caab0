// What the holders of the same weights do together: sums of gradients, launched while backward runs, and ZeRO-1, which is the same
// training with a part of the optimizer on each.
#include "train/replicas.hpp"

#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <set>

#include "base/error.hpp"
#include "support/numbers.hpp"
#include "support/save_checkpoint.hpp"
#include "train/restore.hpp"
#include "train/start.hpp"
#include "train/trainer.hpp"

namespace upcycle {
namespace {

Architecture tiny() {
  Architecture a;
  a.hidden = 32, a.layers = 3, a.heads = 4, a.kv_heads = 2, a.head_dim = 16, a.ffn = 48, a.vocab = 96, a.tied = true;
  a.experts = 8, a.top_k = 2, a.expert_ffn = 24, a.dense_layers = {1};
  return a;
}

RunConfig run_of(int64_t expert, int64_t zero, double clip = 0.0) {
  RunConfig run;
  run.train.steps = 8, run.train.sequence = 16, run.train.global_batch = 8, run.train.micro_batch = 1;
  run.optimizer.lr = 1e-2, run.optimizer.schedule = Schedule::constant, run.optimizer.clip = clip;
  run.balance.aux = 0.05;
  run.parallel.expert = expert, run.parallel.zero = zero;
  return run;
}

/// A model in training, from its random start or a checkpoint.
struct Training {
  RunConfig run;
  Mesh mesh;
  Stage stage;
  std::optional<Optimizer> optimizer;
  Sampler sampler;
  std::optional<Trainer> trainer;

  Training(const RunConfig& config, at::ScalarType compute, const std::filesystem::path& checkpoint = {})
      : run(config),
        mesh(Grid(run.parallel, world_size())),
        stage(tiny(), Layout::even(mesh.grid(), tiny()), mesh),
        sampler({{1.0, "mock"}}, {1, 0, 0}, Split::train, run.train.sequence, tiny().vocab, 3) {
    stage.weights().allocate(compute, at::kCPU, run.parallel.zero);
    if (checkpoint.empty()) fill_masters(stage.weights(), random(tiny(), 3));
    optimizer.emplace(stage.weights(), run.optimizer, /*router_lr_scale=*/0.5);
    trainer.emplace(run, mesh, stage, *optimizer, sampler);
    if (!checkpoint.empty()) trainer->state() = restore_checkpoint(CheckpointReader(checkpoint), stage.weights(), &*optimizer);
  }
  std::vector<StepReport> steps(int count) {
    std::vector<StepReport> reports;
    for (int step = 0; step < count; ++step) reports.push_back(read(trainer->step()));
    return reports;
  }
  const std::vector<Bucket>& buckets() { return stage.weights().buckets(); }
};

/// Values of both are equal, bit for bit.
void expect_same(Training& a, Training& b) {
  ASSERT_EQ(a.stage.weights().all().size(), b.stage.weights().all().size());
  for (size_t i = 0; i < a.stage.weights().all().size(); ++i) {
    const Weight &x = a.stage.weights().all()[i], &y = b.stage.weights().all()[i];
    EXPECT_TRUE(at::equal(x.parameter.value, y.parameter.value)) << x.spec().name;
  }
}

class Zero : public testing::TestWithParam<at::ScalarType> {
 protected:
  void SetUp() override { bucket_elements = 3000; }   // many buckets, whose parts end in the middle of weights
  void TearDown() override { bucket_elements = int64_t{1} << 25; }
};
INSTANTIATE_TEST_SUITE_P(Dtypes, Zero, testing::Values(at::kFloat, at::kBFloat16), [](const auto& dtype) { return std::string(c10::toString(dtype.param)); });

// By MPI the order of summation is that of the ranks, whoever keeps the sum: not a bit differs.
TEST_P(Zero, IsTheSameTrainingBitForBit) {
  for (int64_t expert = 1; expert <= world_size(); expert *= 2) {
    Training whole(run_of(expert, 0), GetParam()), divided(run_of(expert, 1), GetParam());
    const std::vector<StepReport> a = whole.steps(5), b = divided.steps(5);
    for (size_t step = 0; step < a.size(); ++step) {
      EXPECT_EQ(a[step].loss, b[step].loss) << "expert " << expert << " step " << step;
      EXPECT_LE(std::abs(b[step].gradient_norm / a[step].gradient_norm - 1), 1e-6);   // sums of squares end elsewhere
    }
    expect_same(whole, divided);
    EXPECT_LT(a[4].loss, a[0].loss);
  }
}

// Clipping divides by the norm, whose last bits depend on where its sums are cut.
TEST_P(Zero, ClipsByTheSameNorm) {
  Training whole(run_of(1, 0, 0.05), GetParam()), divided(run_of(1, 1, 0.05), GetParam());
  const std::vector<StepReport> a = whole.steps(5), b = divided.steps(5);
  for (size_t step = 0; step < a.size(); ++step) {
    EXPECT_GT(a[step].gradient_norm, 0.05);
    EXPECT_LE(std::abs(b[step].gradient_norm / a[step].gradient_norm - 1), GetParam() == at::kFloat ? 1e-6 : 1e-3);
    EXPECT_LE(std::abs(b[step].loss / a[step].loss - 1), GetParam() == at::kFloat ? 1e-6 : 1e-3);
  }
}

TEST_P(Zero, EachHolderKeepsOnlyItsPart) {
  for (int64_t expert = 1; expert <= world_size(); expert *= 2) {
    Training training(run_of(expert, 1), GetParam());
    int64_t kept = 0, held = 0, allowed = 0;
    for (size_t i = 0; i < training.buckets().size(); ++i) {
      const Bucket& bucket = training.buckets()[i];
      EXPECT_EQ(bucket.masters.numel(), bucket.size / bucket.place.holders);
      EXPECT_EQ(training.optimizer->exp_avg(i).numel(), bucket.masters.numel());
      EXPECT_EQ(training.optimizer->exp_avg_sq(i).numel(), bucket.masters.numel());
      EXPECT_EQ(static_cast<int64_t>(training.optimizer->exp_avg(i).storage().nbytes()), 4 * bucket.masters.numel());
      const bool experts = training.stage.weights().all()[bucket.weights.front()].spec().role == Role::expert;
      EXPECT_EQ(bucket.place.holders, world_size() / (experts ? expert : 1));
      kept += training.optimizer->exp_avg(i).numel();
      held += bucket.size;
      allowed += bucket.size / bucket.place.holders;
    }
    EXPECT_EQ(kept, allowed);
    if (expert == 1) {
      EXPECT_EQ(kept * world_size(), held);
    }
  }
}

// Stopped after three steps, on one layout; going on to the fifth on the same and on another.
TEST_P(Zero, StopAndResumeIsUninterruptedTraining) {
  for (int64_t expert = 1; expert <= world_size(); expert *= 2) {
    Training straight(run_of(expert, 1), GetParam());
    straight.steps(5);
    Training first(run_of(expert, 1), GetParam());
    first.steps(3);
    char pattern[] = "/tmp/upcycle-replicas-XXXXXX";
    const Communicator& world = first.mesh.world();
    const std::filesystem::path directory = world.broadcast(world.rank() == 0 ? std::string(mkdtemp(pattern)) : std::string(), 0);
    RunRecord record;
    record.run_id = "test", record.architecture = to_hf(tiny(), nlohmann::json::object()), record.run = nlohmann::json::object();
    const auto folder = save_checkpoint(directory, first.mesh, first.stage.weights(), &*first.optimizer, first.trainer->state(), record);
    for (const int64_t zero : {1, 0}) {
      Training second(run_of(expert, zero), GetParam(), folder);
      second.steps(2);
      expect_same(second, straight);
    }
    world.barrier();
    if (world.rank() == 0) std::filesystem::remove_all(directory);
  }
}

/// A folder that all ranks see, gone at the end.
class SharedScratch {
 public:
  explicit SharedScratch(const Communicator& world) : world_(world) {
    char pattern[] = "/tmp/upcycle-replicas-XXXXXX";
    path = world.broadcast(world.rank() == 0 ? std::string(mkdtemp(pattern)) : std::string(), 0);
  }
  ~SharedScratch() {
    world_.barrier();
    if (world_.rank() == 0) std::filesystem::remove_all(path);
  }
  std::filesystem::path path;

 private:
  const Communicator& world_;
};

void expect_same_optimizer(Training& a, Training& b) {
  EXPECT_TRUE(at::equal(a.optimizer->updates(), b.optimizer->updates()));
  for (size_t i = 0; i < a.buckets().size(); ++i) {
    EXPECT_TRUE(at::equal(a.buckets()[i].masters, b.buckets()[i].masters)) << i;
    EXPECT_TRUE(at::equal(a.optimizer->exp_avg(i), b.optimizer->exp_avg(i))) << i;
    EXPECT_TRUE(at::equal(a.optimizer->exp_avg_sq(i), b.optimizer->exp_avg_sq(i))) << i;
  }
}

void put_back(Training& training, TrainingState state, int64_t position) {
  state.position = position;
  training.trainer->state() = state;
  training.trainer->balance().restore(state.routers);
}

// Back to a checkpoint from later steps, and on with other data: not a bit of those steps is left. `zero` 0 and 1, every layout of experts.
TEST_P(Zero, RollingBackInProcessIsExact) {
  constexpr int64_t kBehind = 72;   // a sample of the stream
  for (int64_t expert = 1; expert <= world_size(); expert *= 2) {
    for (const int64_t zero : {0, 1}) {
      RunConfig run = run_of(expert, zero);
      run.balance.bias_rate = 0.01, run.balance.scope = BalanceScope::global;
      Training gone_astray(run, GetParam()), straight(run, GetParam());
      const Communicator& world = gone_astray.mesh.world();
      const SharedScratch scratch(world);
      RunRecord record;
      record.run_id = "test", record.architecture = to_hf(tiny(), nlohmann::json::object()), record.run = nlohmann::json::object();
      const auto save = [&](Optimizer* optimizer) {
        gone_astray.trainer->state().routers = gone_astray.trainer->balance().state();
        return save_checkpoint(scratch.path, gone_astray.mesh, gone_astray.stage.weights(), optimizer, gone_astray.trainer->state(), record);
      };
      const auto first = save(nullptr);   // step 0: no moments, routers that remember nothing
      gone_astray.steps(3), straight.steps(3);
      const auto third = save(&*gone_astray.optimizer);
      gone_astray.steps(2);

      put_back(gone_astray, restore_together(CheckpointReader(third), world, gone_astray.stage.weights(), *gone_astray.optimizer), kBehind);
      straight.trainer->state().position = kBehind;
      expect_same(gone_astray, straight);
      expect_same_optimizer(gone_astray, straight);
      EXPECT_EQ(gone_astray.trainer->balance().state(), straight.trainer->balance().state());
      const std::vector<StepReport> a = gone_astray.steps(2), b = straight.steps(2);
      for (size_t step = 0; step < a.size(); ++step) {
        EXPECT_EQ(a[step].step, b[step].step);
        EXPECT_EQ(a[step].loss, b[step].loss);
        EXPECT_EQ(a[step].gradient_norm, b[step].gradient_norm);
      }
      expect_same(gone_astray, straight);
      expect_same_optimizer(gone_astray, straight);

      put_back(gone_astray, restore_together(CheckpointReader(first), world, gone_astray.stage.weights(), *gone_astray.optimizer), kBehind);
      Training fresh(run, GetParam());
      fresh.trainer->state().position = kBehind;
      expect_same_optimizer(gone_astray, fresh);
      EXPECT_EQ(gone_astray.trainer->balance().state(), fresh.trainer->balance().state());
      EXPECT_EQ(gone_astray.steps(1)[0].loss, fresh.steps(1)[0].loss);
      expect_same(gone_astray, fresh);
    }
  }
}

// One bit of one element on one rank is found, and named; what only one rank holds is nobody else's to compare.
TEST_P(Zero, ADifferenceBetweenReplicasIsNamed) {
  for (const int64_t zero : {0, 1}) {
    Training training(run_of(/*expert=*/1, zero), GetParam());
    training.steps(2);
    EXPECT_EQ(training.trainer->differing_replicas(), std::vector<std::string>{});
    const int last = world_size() - 1;
    const auto find = [&](const std::string& name) -> Weight& {
      for (Weight& weight : training.stage.weights().all()) {
        for (const Part& part : weight.parts) {
          if (part.spec.name == name) return weight;
        }
      }
      throw std::logic_error(name);
    };
    const auto flip = [&](const Tensor& x) {
      if (training.mesh.world().rank() != last) return;
      const Tensor bits = x.view({-1}).slice(0, x.numel() - 1).view(x.scalar_type() == at::kFloat ? at::kInt : at::kShort);
      bits.bitwise_xor_(1);
    };
    const std::string norm = "model.layers.1.post_attention_layernorm.weight", down = "model.layers.2.mlp.experts.down_proj.weight";
    flip(find(norm).parameter.value);
    flip(find(down).parameter.value);
    const std::vector<std::string> lines = training.trainer->differing_replicas();
    const std::string others = last == 0 ? "" : last == 1 ? "rank 0" : "ranks 0, 1, 2";
    std::vector<std::string> expected = {down + ": " + others + text(" and rank ", last, " differ"), norm + ": " + others + text(" and rank ", last, " differ")};
    if (world_size() == 1) expected.clear();
    EXPECT_EQ(std::set<std::string>(lines.begin(), lines.end()), std::set<std::string>(expected.begin(), expected.end()));
    flip(find(norm).parameter.value);
    flip(find(down).parameter.value);
    EXPECT_EQ(training.trainer->differing_replicas(), std::vector<std::string>{});

    // Masters that everybody keeps whole are compared, too, where they are not the values.
    if (GetParam() == at::kFloat || zero == 1) continue;
    flip(find(down).parameter.master);
    EXPECT_EQ(training.trainer->differing_replicas().size(), world_size() == 1 ? 0U : 1U);
  }
  // Each expert of a rank of its own: nobody else has it.
  Training spread(run_of(world_size(), 1), GetParam());
  spread.steps(1);
  for (Weight& weight : spread.stage.weights().all()) {
    if (weight.spec().role == Role::expert) weight.parameter.value.add_(spread.mesh.world().rank());
  }
  EXPECT_EQ(spread.trainer->differing_replicas(), std::vector<std::string>{});
}

/// The gradients of a step, by hand: `times` additions of `amount` to each weight of `order`, in that order.
void backward(Weights& weights, const std::vector<size_t>& order, int times, double amount) {
  for (Bucket& bucket : weights.buckets()) bucket.gradients.zero_();
  for (int pass = 0; pass < times; ++pass) {
    for (const size_t index : order) {
      Parameter& parameter = weights.all()[index].parameter;
      parameter.main_grad.add_(amount);
      parameter.ready();
    }
  }
}

class Sums : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override { bucket_elements = 3000; }
  void TearDown() override { bucket_elements = int64_t{1} << 25; }
};
INSTANTIATE_TEST_SUITE_P(Zero, Sums, testing::Values(0, 1));

TEST_P(Sums, AreLaunchedByTheLastAdditionFromTheSecondStepOn) {
  const Mesh mesh(Grid(ParallelSection{}, world_size()));
  Stage stage(tiny(), Layout::even(mesh.grid(), tiny()), mesh);
  Weights& weights = stage.weights();
  weights.allocate(at::kFloat, at::kCPU, GetParam());
  weights.start_training();
  Replicas replicas(weights, mesh);
  ASSERT_GT(weights.buckets().size(), 4U);
  std::vector<size_t> last_to_first, first_to_last;
  for (size_t i = 0; i < weights.all().size(); ++i) first_to_last.push_back(i);
  last_to_first.assign(first_to_last.rbegin(), first_to_last.rend());

  const auto mine = [&](size_t bucket) {
    const Range run = weights.buckets()[bucket].owned(0);
    return run.size() == 0 ? at::full({1}, -1.0) : weights.buckets()[bucket].gradients.narrow(0, run.begin, run.size());
  };
  const double ranks = world_size() * (world_size() + 1) / 2.0;
  const auto is = [](const Tensor& x, double value) { return x.min().item<double>() == value && x.max().item<double>() == value; };
  const auto summed = [&](size_t bucket, double sum) { return weights.buckets()[bucket].owned(0).size() == 0 || is(mine(bucket), sum); };
  const double own = 2.0 * (world_size() == 1 ? 1 : mesh.world().rank() + 1), sum = 2.0 * ranks;

  backward(weights, last_to_first, 2, mesh.world().rank() + 1);   // the first step counts
  for (size_t b = 0; b < weights.buckets().size(); ++b) EXPECT_TRUE(summed(b, own)) << b;
  replicas.sum_gradients();
  for (size_t b = 0; b < weights.buckets().size(); ++b) {
    replicas.wait_for_sum(b);
    EXPECT_TRUE(summed(b, sum)) << b;
  }

  backward(weights, last_to_first, 2, mesh.world().rank() + 1);
  for (size_t b = 0; b < weights.buckets().size(); ++b) EXPECT_TRUE(summed(b, sum)) << b << ": before anyone asked";
  replicas.sum_gradients();

  // Whatever the order of the additions, the order of the sums is that of the buckets.
  for (Bucket& bucket : weights.buckets()) bucket.gradients.zero_();
  std::vector<size_t> but_one(first_to_last);
  const size_t held_back = weights.buckets().front().weights.front();
  std::erase(but_one, held_back);
  backward(weights, but_one, 2, mesh.world().rank() + 1);
  for (size_t b = 1; b < weights.buckets().size(); ++b) EXPECT_TRUE(summed(b, own)) << b << ": the first bucket is not complete";
  weights.all()[held_back].parameter.main_grad.add_(2.0 * (mesh.world().rank() + 1));
  weights.all()[held_back].parameter.ready();
  weights.all()[held_back].parameter.ready();
  for (size_t b = 0; b < weights.buckets().size(); ++b) EXPECT_TRUE(summed(b, sum)) << b;
  replicas.sum_gradients();

  // An addition more than in the first step came behind the sum.
  backward(weights, last_to_first, 2, 1.0);
  weights.all()[held_back].parameter.ready();
  EXPECT_THROW(replicas.sum_gradients(), std::logic_error);
}

}  // namespace
}  // namespace upcycle
