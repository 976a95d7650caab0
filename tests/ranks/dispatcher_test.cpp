// Tokens that travel to experts on other ranks come to the same results and gradients as where all experts are at home.
#include "moe/dispatcher.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/bincount.h>
#include <ATen/ops/softmax.h>
#include <gtest/gtest.h>

#include "moe/moe_layer.hpp"
#include "support/numbers.hpp"

// Shapes: T tokens of all ranks, K choices of each, E experts, L of them on this rank, F width of one expert, D width.
namespace upcycle {
namespace {

constexpr int64_t kExperts = 8, kChoices = 2, kWidth = 5, kHidden = 6;

/// Who routes where: the tokens of each rank, and which experts are chosen.
struct Scene {
  const char* name;
  std::vector<int64_t> (*tokens_of)(int ranks);
  Tensor (*choose)(int64_t tokens);
};

std::vector<int64_t> uneven(int ranks) {
  std::vector<int64_t> tokens;
  for (int rank = 0; rank < ranks; ++rank) tokens.push_back(11 + 7 * rank);
  return tokens;
}
std::vector<int64_t> last_only(int ranks) {
  std::vector<int64_t> tokens(static_cast<size_t>(ranks), 0);
  tokens.back() = 13;
  return tokens;
}
std::vector<int64_t> nobody(int ranks) { return std::vector<int64_t>(static_cast<size_t>(ranks), 0); }

Tensor anyone(int64_t tokens) { return choose_experts(normal({tokens, kExperts}, 1), kChoices); }
Tensor the_first_two(int64_t tokens) { return at::zeros({tokens, kChoices}, at::kLong).add_(at::arange(kChoices)); }
Tensor odd_ones(int64_t tokens) { return choose_experts(normal({tokens, kExperts / 2}, 1), kChoices) * 2 + 1; }

const std::vector<Scene> kScenes = {{"anyone", uneven, anyone},           {"the first two experts", uneven, the_first_two},
                                    {"odd experts", uneven, odd_ones},    {"tokens on the last rank only", last_only, anyone},
                                    {"no tokens at all", nobody, anyone}, {"last rank, first experts", last_only, the_first_two}};

Routing routing_of(const Tensor& expert_TK, const Tensor& weight_TK) {
  return {expert_TK, weight_TK, at::bincount(expert_TK.reshape({-1}), {}, kExperts)};
}

int64_t sum_before(const std::vector<int64_t>& tokens, int rank) {
  int64_t sum = 0;
  for (int r = 0; r < rank; ++r) sum += tokens[static_cast<size_t>(r)];
  return sum;
}

struct Outcome {
  Tensor y_TD, dx_TD, d_weight_TK, d_gate_up, d_down;
};

/// Forward and backward of experts [first, first + count) on `group`, for the given tokens.
Outcome run(const Communicator& group, const Tensor& x_TD, const Tensor& expert_TK, const Tensor& weight_TK, const Tensor& dy_TD) {
  const int64_t local = kExperts / group.size(), first = local * group.rank();
  Parameter gate_up = trained(normal({kExperts, 2 * kWidth, kHidden}, 2).narrow(0, first, local).clone());
  Parameter down = trained(normal({kExperts, kHidden, kWidth}, 3).narrow(0, first, local).clone());
  const Tensor x = x_TD.clone().requires_grad_(), weight = weight_TK.clone().requires_grad_();
  const Dispatcher dispatcher(group, kExperts);
  const Arrived arrived = dispatcher.dispatch(x, routing_of(expert_TK, weight));
  const Tensor y = dispatcher.combine(Experts(gate_up, down).forward(arrived.x_RD, arrived.end_L), arrived);
  run_backward(y, dy_TD);
  return {y.detach(), x.grad(), weight.grad(), gate_up.main_grad, down.main_grad};
}

TEST(DispatcherOnRanks, ResultsAndGradientsAreThoseOfOneRank) {
  const Communicator world = Communicator::everyone(), alone;
  for (const Scene& scene : kScenes) {
    SCOPED_TRACE(scene.name);
    const std::vector<int64_t> tokens = scene.tokens_of(world.size());
    const int64_t total = sum_before(tokens, world.size()), first = sum_before(tokens, world.rank());
    const int64_t mine = tokens[static_cast<size_t>(world.rank())];
    const Tensor x = normal({total, kHidden}, 4), dy = normal({total, kHidden}, 5), weight = normal({total, kChoices}, 6);
    const Tensor expert_TK = scene.choose(total);
    const auto here = [&](const Tensor& t) { return t.narrow(0, first, mine).contiguous(); };

    const Outcome one = run(alone, x, expert_TK, weight, dy);
    const Outcome ours = run(world, here(x), here(expert_TK), here(weight), here(dy));
    EXPECT_LE(distance(ours.y_TD, here(one.y_TD)), 1e-6);
    EXPECT_LE(distance(ours.dx_TD, here(one.dx_TD)), 1e-6);
    EXPECT_LE(distance(ours.d_weight_TK, here(one.d_weight_TK)), 1e-6);
    const int64_t local = kExperts / world.size();
    EXPECT_LE(distance(ours.d_gate_up, one.d_gate_up.narrow(0, world.rank() * local, local)), 1e-6);
    EXPECT_LE(distance(ours.d_down, one.d_down.narrow(0, world.rank() * local, local)), 1e-6);
  }
}

TEST(DispatcherOnRanks, CombineOfDispatchIsX) {
  const Communicator world = Communicator::everyone();
  const Dispatcher dispatcher(world, kExperts);
  for (const Scene& scene : kScenes) {
    SCOPED_TRACE(scene.name);
    const int64_t mine = scene.tokens_of(world.size())[static_cast<size_t>(world.rank())];
    const uint64_t seed = 100 + static_cast<uint64_t>(world.rank());
    const Tensor x = normal({mine, kHidden}, seed).requires_grad_(), dy = normal({mine, kHidden}, seed + 50);
    const Tensor logits = normal({mine, kChoices}, 7);
    const Arrived arrived = dispatcher.dispatch(x, routing_of(scene.choose(mine), at::softmax(logits, -1)));
    const Tensor y = dispatcher.combine(arrived.x_RD, arrived);
    run_backward(y, dy);
    EXPECT_LE(distance(y, x), 1e-6);
    EXPECT_LE(distance(x.grad(), dy), 1e-6);
  }
}

/// Rows carry what they are (expert asked for, sender, place), so that each can be asked whether it is where it belongs.
TEST(DispatcherOnRanks, RowsArriveSortedByExpertThenSenderThenToken) {
  const Communicator world = Communicator::everyone();
  const int64_t mine = uneven(world.size())[static_cast<size_t>(world.rank())], local = kExperts / world.size();
  const Tensor expert_TK = choose_experts(normal({mine, kExperts}, 40 + static_cast<uint64_t>(world.rank())), 1);
  Tensor x = at::zeros({mine, 3});
  x.select(1, 0).copy_(expert_TK.squeeze(1));
  x.select(1, 1).fill_(world.rank());
  x.select(1, 2).copy_(at::arange(mine));
  const Arrived arrived = Dispatcher(world, kExperts).dispatch(x, routing_of(expert_TK, at::zeros({mine, 1}).add_(1.0)));
  const Tensor place = arrived.x_RD.select(1, 0) * 1e6 + arrived.x_RD.select(1, 1) * 1e3 + arrived.x_RD.select(1, 2);
  EXPECT_TRUE(place.equal(std::get<0>(place.sort())));
  for (int64_t l = 0, begin = 0; l < local; ++l) {
    const int64_t end = arrived.end_L[l].item<int32_t>();
    EXPECT_TRUE(arrived.x_RD.select(1, 0).narrow(0, begin, end - begin).eq(world.rank() * local + l).all().item<bool>());
    begin = end;
  }
  EXPECT_EQ(world.all_reduce(arrived.x_RD.size(0), Reduce::sum), world.all_reduce(mine, Reduce::sum));
}

}  // namespace
}  // namespace upcycle
