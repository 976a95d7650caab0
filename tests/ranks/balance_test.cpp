// Balance does not depend on the layout: the ranks that share a micro-batch together have one rank's losses, counts and router
// gradients, in every scope; biases move the load towards balance and come back from a checkpoint bit for bit.
#include <ATen/ops/arange.h>
#include <ATen/ops/linspace.h>
#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <numeric>

#include "base/error.hpp"
#include "base/rng.hpp"
#include "support/numbers.hpp"
#include "support/save_checkpoint.hpp"
#include "support/scratch.hpp"
#include "support/tensors.hpp"
#include "support/tiny_training.hpp"

// Shapes: T tokens of this rank, K choices of each, E experts, D width.
namespace upcycle {
namespace {

constexpr std::array kScopes = {BalanceScope::batch, BalanceScope::sequence, BalanceScope::global};

Communicator everyone() { return world_size() == 1 ? Communicator() : Communicator::everyone(); }

struct Seen {
  Tensor weight_grad, x_grad, measures_3, count_E;
};

/// A router on rows [first, first + rows) of 3 sequences of 8 tokens, which `sharing` holds among its ranks.
Seen route(const Communicator& sharing, BalanceScope scope, int64_t first, int64_t rows) {
  const Tensor all = normal({24, 10}, 1), dy = normal({24, 2}, 2);
  Parameter weight = trained(normal({6, 10}, 3));
  Router router(weight, sharing, {.top_k = 2, .layer = 1});
  if (scope == BalanceScope::global) router.state().count_E = at::arange(1, 7, at::kLong);
  router.state().bias_E = normal({6}, 4) * 0.3;
  const Tensor x = all.narrow(0, first, rows).clone().requires_grad_();
  RouterContext context{.balance = {.aux = 0.7, .z = 0.2, .scope = scope, .sequences = 3}, .jitter = {0.1, 5}};
  context.balance.sequence_T = at::arange(3, at::kLong).repeat_interleave(8).narrow(0, first, rows);
  context.token_T = at::arange(first, first + rows, at::kLong);
  run_backward(router.forward(x, context).weight_TK, dy.narrow(0, first, rows));
  return {weight.main_grad, x.grad(), router.statistics().measures_3, router.statistics().count_E};
}

TEST(Balance, RanksThatShareAMicroBatchAreOneRank) {
  const Communicator world = everyone(), alone;
  const int64_t rows = 24 / world.size();
  for (const BalanceScope scope : kScopes) {
    SCOPED_TRACE(text("scope ", static_cast<int>(scope)));
    const Seen one = route(alone, scope, 0, 24);
    Seen ours = route(world, scope, world.rank() * rows, rows);
    if (world.size() > 1) EXPECT_GT(distance(ours.measures_3, one.measures_3), 0.1) << "parts, not the whole on each";
    for (Tensor* partial : {&ours.weight_grad, &ours.measures_3, &ours.count_E}) world.all_reduce(*partial);
    EXPECT_LE(distance(ours.weight_grad, one.weight_grad), 1e-6);
    EXPECT_LE(distance(ours.measures_3, one.measures_3), 1e-6);
    EXPECT_TRUE(ours.count_E.equal(one.count_E));
    EXPECT_LE(distance(ours.x_grad, one.x_grad.narrow(0, world.rank() * rows, rows)), 1e-6);
  }
}

/// A model of two MoE layers and a dense one in training, whose routers prefer few experts.
TinyTraining train(const BalanceSection& balance) {
  TinyModel model;
  model.seed = 7;
  Architecture& a = model.architecture;
  a.hidden = 32, a.layers = 3, a.heads = 4, a.kv_heads = 2, a.head_dim = 8, a.ffn = 48, a.vocab = 96;
  a.experts = 8, a.top_k = 2, a.expert_ffn = 16, a.dense_layers = {1};
  RunConfig& run = model.run;
  run.train.steps = 40, run.train.sequence = 16, run.train.global_batch = 8, run.train.micro_batch = 2;
  run.train.precision = Precision::fp32;
  run.optimizer.lr = 1e-4, run.optimizer.schedule = Schedule::constant;
  run.balance = balance;
  run.parallel.expert = world_size(), run.parallel.zero = 0;
  model.weights = [](const ParameterSpec& spec, const Box& box, Tensor target) {
    Tensor x = normal(spec.shape, Random(3, spec.name).bits(0)) / std::sqrt(static_cast<double>(spec.shape.back()));
    if (spec.role == Role::norm) x = 1 + 0.2 * x;
    if (spec.role == Role::embedding) x = x * 4;
    if (spec.role == Role::router) x = x * at::linspace(0.5, 1.5, spec.shape[0]).unsqueeze(1);   // long rows win more often
    for (size_t d = 0; d < box.begin.size(); ++d) x = x.narrow(static_cast<int64_t>(d), box.begin[d], box.size[d]);
    target.copy_(x);
  };
  return TinyTraining(model, run);
}

TEST(Balance, BiasesMoveTheLoadTowardsBalance) {
  TinyTraining with = train({.aux = 0.0, .bias_rate = 0.05}), without = train({.aux = 0.0});
  EXPECT_EQ(without.step().load_max_over_mean, with.step().load_max_over_mean) << "biases start at zero";
  double moved = 0.0, unmoved = 0.0;   // means over the last ten steps: one has 128 tokens, which is noisy
  for (int step = 1; step < 40; ++step) {
    const double a = with.step().load_max_over_mean, b = without.step().load_max_over_mean;
    if (step >= 30) moved += a / 10, unmoved += b / 10;
  }
  EXPECT_GT(unmoved, 1.3) << "routers in balance from the start prove nothing";
  EXPECT_LT(moved - 1, 0.6 * (unmoved - 1));
  for (Router* router : with.stage().routers()) {
    const Tensor bias = router->state().bias_E;
    for (const std::string& other : with.mesh().world().all_gather(text(bias))) EXPECT_EQ(other, text(bias)) << "one bias on all ranks";
  }
}

TEST(Balance, ASkippedStepChangesNothing) {
  TinyTraining training = train({.aux = 0.01, .scope = BalanceScope::global, .bias_rate = 0.05});
  training.step();
  const nlohmann::json before = training.trainer().balance().state();
  EXPECT_EQ(before.size(), 2U);
  training.stage().weights().all().front().parameter.value.fill_(std::nan(""));
  EXPECT_TRUE(training.step().skipped);
  EXPECT_EQ(training.trainer().balance().state(), before);
}

TEST(Balance, StopAndResumeIsBitwiseTheUninterruptedRun) {
  Scratch scratch;   // rank 0's is everybody's
  const BalanceSection balance{.aux = 0.05, .scope = BalanceScope::global, .bias_rate = 0.03, .jitter = 0.05};
  TinyTraining whole = train(balance), first = train(balance), second = train(balance);
  const std::filesystem::path folder = whole.mesh().world().broadcast(scratch.path().string(), 0);
  for (int step = 0; step < 3; ++step) whole.step(), first.step();
  TrainingState& state = first.trainer().state();
  state.routers = first.trainer().balance().state();
  const auto stored = save_checkpoint(folder, first.mesh(), first.stage().weights(), &first.optimizer(), state, {});
  second.trainer().state() = restore_checkpoint(CheckpointReader(stored), second.stage().weights(), &second.optimizer());
  second.trainer().balance().restore(second.trainer().state().routers);
  for (int step = 0; step < 3; ++step) {
    const StepReport a = whole.step(), b = second.step();
    EXPECT_EQ(a.loss, b.loss);
    EXPECT_EQ(a.aux_loss, b.aux_loss);
    EXPECT_EQ(a.tokens_per_expert, b.tokens_per_expert);
  }
  for (size_t r = 0; r < whole.stage().routers().size(); ++r) {
    RouterState &a = whole.stage().routers()[r]->state(), &b = second.stage().routers()[r]->state();
    EXPECT_TRUE(same_bits(a.bias_E, b.bias_E));
    EXPECT_TRUE(same_bits(a.count_E, b.count_E));
    EXPECT_GT(a.bias_E.abs().max().item<double>(), 0.0);
  }
  nlohmann::json damaged = state.routers;
  damaged.begin()->at("bias").push_back(1.0);
  EXPECT_NE(user_error([&] { second.trainer().balance().restore(damaged); }).find("9 numbers in 'bias'"), std::string::npos);
  whole.mesh().world().barrier();   // nobody reads rank 0's directory any more
}

TEST(Balance, ReportsCount) {
  TinyTraining training = train({.aux = 0.05, .jitter = 0.05});
  const StepReport report = training.step();
  ASSERT_EQ(report.tokens_per_expert.size(), 2U);
  int64_t choices = 0;
  for (const auto& layer : report.tokens_per_expert) choices += std::accumulate(layer.begin(), layer.end(), int64_t{0});
  EXPECT_EQ(choices, 2 * 8 * 16 * 2);
  EXPECT_GT(report.router_entropy, 0.5);
  EXPECT_LT(report.router_entropy, std::log(8.0));
  const ExpertLoad load = read_load(at::tensor({4, 0, 0, 2, 3, 2, 2, 0, 2, 1}, at::kLong).view({2, 5}));   // 4 experts, then drops
  EXPECT_EQ(load.tokens_per_expert, (std::vector<std::vector<int64_t>>{{4, 0, 0, 2}, {2, 2, 0, 2}}));
  EXPECT_EQ(load.dead_experts, 3);
  EXPECT_EQ(load.dropped, 4);
  EXPECT_NEAR(load.load_max_over_mean, (4 * 4 / 6.0 + 2 * 4 / 6.0) / 2, 1e-12);
}

// Where the rows of a rank stand, by the definition: B sequences of an early and a late chunk, flattened, one slice a tensor rank.
TEST(Balance, RowsKnowTheirSequenceAndToken) {
  for (const int64_t context : {1, 2, 4}) {
    if (world_size() % context != 0) continue;
    RunConfig run;
    run.run.seed = 11, run.train.sequence = 16, run.train.micro_batch = 2, run.train.global_batch = 4;
    run.balance.scope = BalanceScope::sequence, run.balance.jitter = 0.1;
    run.parallel.context = context, run.parallel.tensor = world_size() / context;
    const Mesh mesh(Grid(run.parallel, world_size()));
    Architecture a;
    a.hidden = 32, a.layers = 1, a.heads = 4, a.kv_heads = 4, a.head_dim = 8, a.ffn = 48, a.vocab = 96;
    a.experts = 4, a.top_k = 2, a.expert_ffn = 16;
    Stage stage(a, Layout::even(mesh.grid(), a), mesh);
    stage.weights().allocate(at::kFloat, at::kCPU);
    std::vector<int64_t> sequence, token;
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t position = 0; position < 16; ++position) {
        const int64_t chunk = position / (8 / context), owner = std::min(chunk, 2 * context - 1 - chunk);
        if (owner != mesh.here()[Axis::context]) continue;
        sequence.push_back(b);
        token.push_back((100 + b) * 16 + position);
      }
    }
    const int64_t rows = static_cast<int64_t>(token.size()) / run.parallel.tensor, first = mesh.here()[Axis::tensor] * rows;
    const RouterContext told = Balance(run, mesh, stage).context(100);
    EXPECT_TRUE(told.balance.sequence_T.equal(at::tensor(sequence).narrow(0, first, rows)));
    EXPECT_TRUE(told.token_T.equal(at::tensor(token).narrow(0, first, rows)));
    EXPECT_EQ(told.jitter.seed, 11U);
  }
}

}  // namespace
}  // namespace upcycle
