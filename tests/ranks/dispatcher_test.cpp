// Tokens that travel to experts on other ranks come to the results and gradients of the sum written out on one rank: both dispatchers,
// experts and their width cut over the ranks, dropped choices, padding.
#include "moe/dispatcher.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include "base/error.hpp"
#include "moe/capacity.hpp"
#include "moe/moe_layer.hpp"
#include "support/numbers.hpp"

// Shapes: T tokens of all ranks, K choices of each, E experts, L of them on this rank, F width of one expert, D width.
namespace upcycle {
namespace {

constexpr int64_t kExperts = 8, kChoices = 2, kWidth = 8, kHidden = 6;

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
std::vector<int64_t> even(int ranks) { return std::vector<int64_t>(static_cast<size_t>(ranks), 12); }
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

Routing routing_of(const Tensor& expert_TK, const Tensor& weight_TK, int64_t capacity = 0) {
  return {expert_TK, weight_TK, count_choices(expert_TK, kExperts), capacity};
}

int64_t sum_before(const std::vector<int64_t>& tokens, int rank) {
  int64_t sum = 0;
  for (int r = 0; r < rank; ++r) sum += tokens[static_cast<size_t>(r)];
  return sum;
}

/// The ranks as experts x parts of their width; neighbours share an expert.
struct Groups {
  Communicator experts, expert_tensor;
  Groups(const Communicator& world, int parts)
      : experts(world.split(world.rank() % parts, world.rank())), expert_tensor(world.split(world.rank() / parts, world.rank())) {}
};

struct Outcome {
  Tensor y_TD, dx_TD, d_weight_TK, d_gate_up, d_down;
};

Tensor whole_gate_up() { return normal({kExperts, 2 * kWidth, kHidden}, 2); }
Tensor whole_down() { return normal({kExperts, kHidden, kWidth}, 3); }

/// This rank's part of a tensor [E, ...]: its experts, and its part of each of `blocks` stretches along `dim`.
Tensor part_of(const Groups& groups, const Tensor& whole, int64_t dim, int64_t blocks) {
  const int64_t local = kExperts / groups.experts.size();
  std::vector<Tensor> parts;
  for (const Tensor& block : whole.narrow(0, groups.experts.rank() * local, local).chunk(blocks, dim)) {
    parts.push_back(block.chunk(groups.expert_tensor.size(), dim)[static_cast<size_t>(groups.expert_tensor.rank())]);
  }
  return at::cat(parts, dim).clone();
}

/// Every expert for every token, then the chosen ones: no sorting, no rows. fp64. Expert E is nobody.
Outcome written_out(const Tensor& x_TD, const Tensor& expert_TK, const Tensor& weight_TK, const Tensor& dy_TD) {
  const auto leaf = [](const Tensor& of) { return of.detach().to(at::kDouble).requires_grad_(); };
  const Tensor x = leaf(x_TD), weight = leaf(weight_TK), gate_up = leaf(whole_gate_up()), down = leaf(whole_down());
  Tensor y = at::zeros_like(x);
  for (int64_t e = 0; e < kExperts; ++e) {
    const Tensor both = at::matmul(x, gate_up[e].t()), gate = both.narrow(1, 0, kWidth);
    const Tensor weight_T1 = (weight * expert_TK.eq(e)).sum(1, true);
    y = y + at::matmul(gate * at::sigmoid(gate) * both.narrow(1, kWidth, kWidth), down[e].t()) * weight_T1;
  }
  run_backward(y, dy_TD.to(at::kDouble));
  return {y.detach(), x.grad(), weight.grad(), gate_up.grad(), down.grad()};
}

Outcome run(const Groups& groups, DispatcherSettings settings, const Tensor& x_TD, const Routing& routing, const Tensor& dy_TD) {
  Parameter gate_up = trained(part_of(groups, whole_gate_up(), 1, 2)), down = trained(part_of(groups, whole_down(), 2, 1));
  const Tensor x = x_TD.clone().requires_grad_(), weight = routing.weight_TK.clone().requires_grad_();
  settings.experts = kExperts, settings.top_k = kChoices;
  const Dispatcher dispatcher(groups.experts, groups.expert_tensor, settings);
  const Route route = dispatcher.plan(routing);
  Remade nothing(false);
  const auto [x_RD, weight_R1] = dispatcher.dispatch(x, weight, route);
  const Tensor y = dispatcher.combine(Experts(gate_up, down).forward(x_RD, weight_R1, route.end_L, nothing), route);
  run_backward(y, dy_TD);
  EXPECT_EQ(gate_up.additions, 1);
  return {y.detach(), x.grad(), weight.grad(), gate_up.main_grad, down.main_grad};
}

/// Each factoring of the world into experts x parts of their width, with each dispatcher.
template <class Check>
void on_every_layout(const Communicator& world, Check&& check) {
  for (int parts = 1; parts <= world.size(); parts *= 2) {
    const Groups groups(world, parts);
    for (const Dispatch how : {Dispatch::all_to_all, Dispatch::all_gather}) {
      SCOPED_TRACE(text("expert ", world.size() / parts, ", expert_tensor ", parts, how == Dispatch::all_to_all ? ", all-to-all" : ", all-gather"));
      check(groups, how);
    }
  }
}

void expect_parts(const Groups& groups, const Outcome& ours, const Outcome& whole, int64_t first, int64_t tokens) {
  const auto here = [&](const Tensor& t) { return t.narrow(0, first, tokens); };
  EXPECT_LE(distance(ours.y_TD, here(whole.y_TD)), 1e-6);
  EXPECT_LE(distance(ours.dx_TD, here(whole.dx_TD)), 1e-6);
  EXPECT_LE(distance(ours.d_weight_TK, here(whole.d_weight_TK)), 1e-6);
  EXPECT_LE(distance(ours.d_gate_up, part_of(groups, whole.d_gate_up, 1, 2)), 1e-6);
  EXPECT_LE(distance(ours.d_down, part_of(groups, whole.d_down, 2, 1)), 1e-6);
}

TEST(DispatcherOnRanks, ResultsAndGradientsAreThoseOfTheSumWrittenOut) {
  const Communicator world = Communicator::everyone();
  for (const Scene& scene : kScenes) {
    SCOPED_TRACE(scene.name);
    const std::vector<int64_t> tokens = scene.tokens_of(world.size());
    const int64_t total = sum_before(tokens, world.size()), first = sum_before(tokens, world.rank());
    const int64_t mine = tokens[static_cast<size_t>(world.rank())];
    const Tensor x = normal({total, kHidden}, 4), dy = normal({total, kHidden}, 5), weight = normal({total, kChoices}, 6);
    const Tensor expert_TK = scene.choose(total);
    const auto here = [&](const Tensor& t) { return t.narrow(0, first, mine).contiguous(); };
    const Outcome whole = written_out(x, expert_TK, weight, dy);
    on_every_layout(world, [&](const Groups& groups, Dispatch how) {
      const Outcome ours = run(groups, {.how = how}, here(x), routing_of(here(expert_TK), here(weight)), here(dy));
      expect_parts(groups, ours, whole, first, mine);
    });
  }
}

TEST(DispatcherOnRanks, DroppedChoicesAreLeftOutPaddedOrNot) {
  const Communicator world = Communicator::everyone();
  for (const Scene& scene : {kScenes[0], kScenes[1], kScenes[3], Scene{"evenly many tokens", even, anyone}, Scene{"all to two", even, the_first_two}}) {
    SCOPED_TRACE(scene.name);
    const std::vector<int64_t> tokens = scene.tokens_of(world.size());
    const int64_t total = sum_before(tokens, world.size()), first = sum_before(tokens, world.rank());
    const int64_t mine = tokens[static_cast<size_t>(world.rank())];
    const Tensor x = normal({total, kHidden}, 4), dy = normal({total, kHidden}, 5), weight = normal({total, kChoices}, 6).abs();
    const auto here = [&](const Tensor& t) { return t.narrow(0, first, mine).contiguous(); };
    for (const double factor : {0.5, 1.0, 8.0}) {
      SCOPED_TRACE(text("capacity factor ", factor));
      const Communicator alone;
      const Routing kept = limited(routing_of(scene.choose(total), weight), at::arange(total), alone, {factor, DropPolicy::weight});
      const Outcome whole = written_out(x, kept.expert_TK, weight, dy);
      on_every_layout(world, [&](const Groups& groups, Dispatch how) {
        const Routing routing = routing_of(here(kept.expert_TK), here(weight), kept.capacity);
        expect_parts(groups, run(groups, {.how = how}, here(x), routing, here(dy)), whole, first, mine);
        if (scene.tokens_of != even) return;   // padded, all ranks have as many tokens
        expect_parts(groups, run(groups, {.how = how, .pad = true}, here(x), routing, here(dy)), whole, first, mine);
      });
    }
  }
}

TEST(DispatcherOnRanks, PaddedRowsHaveOneShapeWhateverIsChosen) {
  const Communicator world = Communicator::everyone();
  constexpr int64_t kTokens = 12, kCapacity = 3;
  on_every_layout(world, [&](const Groups& groups, Dispatch how) {
    const int64_t per_expert = kCapacity * world.size();
    for (const auto choose : {anyone, the_first_two, odd_ones}) {
      const Communicator alone;
      Routing routing = limited(routing_of(choose(kTokens), normal({kTokens, kChoices}, 6).abs()), at::arange(kTokens), alone, {1.0});
      ASSERT_EQ(routing.capacity, kCapacity);
      const Dispatcher dispatcher(groups.experts, groups.expert_tensor, {kExperts, kChoices, how, true});
      const Route route = dispatcher.plan(routing);
      EXPECT_TRUE(route.end_L.equal((at::arange(1, kExperts / groups.experts.size() + 1) * per_expert).to(at::kInt)));
      EXPECT_EQ(dispatcher.dispatch(normal({kTokens, kHidden}, 7), route).size(0), per_expert * kExperts / groups.experts.size());
    }
  });
}

TEST(DispatcherOnRanks, CombineOfDispatchIsX) {
  const Communicator world = Communicator::everyone();
  for (const Scene& scene : kScenes) {
    SCOPED_TRACE(scene.name);
    on_every_layout(world, [&](const Groups& groups, Dispatch how) {
      const Dispatcher dispatcher(groups.experts, groups.expert_tensor, {kExperts, kChoices, how});
      const int64_t mine = scene.tokens_of(world.size())[static_cast<size_t>(world.rank())];
      const uint64_t seed = 100 + static_cast<uint64_t>(world.rank());
      const Tensor x = normal({mine, kHidden}, seed).requires_grad_(), dy = normal({mine, kHidden}, seed + 50);
      const Tensor weight = at::softmax(normal({mine, kChoices}, 7), -1);
      const Route route = dispatcher.plan(routing_of(scene.choose(mine), weight));
      const double part = 1.0 / groups.expert_tensor.size();   // what each part of a width adds to the sum
      const Tensor y = dispatcher.combine(dispatcher.dispatch(x, route) * dispatcher.weights(weight, route) * part, route);
      run_backward(y, dy);
      EXPECT_LE(distance(y, x), 1e-6);
      EXPECT_LE(distance(x.grad(), dy), 1e-6);
    });
  }
}

/// Rows carry what they are (expert asked for, sender, place), so that each can be asked whether it is where it belongs.
TEST(DispatcherOnRanks, RowsArriveSortedByExpertThenSenderThenToken) {
  const Communicator world = Communicator::everyone();
  const int64_t mine = uneven(world.size())[static_cast<size_t>(world.rank())];
  const Tensor expert_TK = choose_experts(normal({mine, kExperts}, 40 + static_cast<uint64_t>(world.rank())), 1);
  on_every_layout(world, [&](const Groups& groups, Dispatch how) {
    const int64_t local = kExperts / groups.experts.size();
    Tensor x = at::zeros({mine, 3});
    x.select(1, 0).copy_(expert_TK.squeeze(1));
    // by width part first, then by expert rank: the order in which the groups bring them
    x.select(1, 1).fill_(groups.expert_tensor.rank() * groups.experts.size() + groups.experts.rank());
    x.select(1, 2).copy_(at::arange(mine));
    const Dispatcher dispatcher(groups.experts, groups.expert_tensor, {kExperts, 1, how});
    const Route route = dispatcher.plan(routing_of(expert_TK, at::zeros({mine, 1}).add_(1.0)));
    const Tensor x_RD = dispatcher.dispatch(x, route);
    const Tensor place = x_RD.select(1, 0) * 1e6 + x_RD.select(1, 1) * 1e3 + x_RD.select(1, 2);
    EXPECT_TRUE(place.equal(std::get<0>(place.sort())));
    for (int64_t l = 0, begin = 0; l < local; ++l) {
      const int64_t end = route.end_L[l].item<int32_t>();
      EXPECT_TRUE(x_RD.select(1, 0).narrow(0, begin, end - begin).eq(groups.experts.rank() * local + l).all().item<bool>());
      begin = end;
    }
    EXPECT_EQ(world.all_reduce(x_RD.size(0), Reduce::sum), world.all_reduce(mine, Reduce::sum) * groups.expert_tensor.size());
  });
}

TEST(DispatcherOnRanks, AutoTakesTheOneThatReceivesLess) {
  const Communicator world = Communicator::everyone(), alone;
  const auto chosen = [&](const Communicator& experts, const Communicator& parts, int64_t top_k) {
    return Dispatcher(experts, parts, {kExperts, top_k}).how();
  };
  if (world.size() == 1) EXPECT_EQ(chosen(world, alone, 8), Dispatch::all_to_all);   // nothing travels
  if (world.size() == 2) {
    EXPECT_EQ(chosen(world, alone, 3), Dispatch::all_to_all);   // 6 bytes a number against 4 * 3 / 2
    EXPECT_EQ(chosen(world, alone, 4), Dispatch::all_gather);
    EXPECT_EQ(chosen(alone, world, 1), Dispatch::all_to_all);   // 6 against 4
    EXPECT_EQ(chosen(alone, world, 2), Dispatch::all_gather);
  }
  if (world.size() == 4) {
    EXPECT_EQ(chosen(world, alone, 6), Dispatch::all_to_all);   // 18 against 4 * 6 * 3 / 4
    EXPECT_EQ(chosen(world, alone, 7), Dispatch::all_gather);
  }
}

TEST(DispatcherOnRanks, WhatIsDroppedDoesNotDependOnTheLayout) {
  const Communicator world = Communicator::everyone(), alone;
  constexpr int64_t kTokens = 16;
  const int64_t total = kTokens * world.size();
  const Tensor expert_TK = anyone(total), weight = (normal({total, kChoices}, 6).abs() * 8).round() / 8;   // ties
  // Tokens of the micro-batch lie anywhere: rank r holds those whose number is r modulo the ranks, the last one first.
  const Tensor number_T = (total - 1 - world.rank()) - at::arange(kTokens) * world.size();
  const auto here = [&](const Tensor& t) { return t.index_select(0, number_T); };
  for (const DropPolicy policy : {DropPolicy::weight, DropPolicy::position}) {
    const Routing whole = limited(routing_of(expert_TK, weight), at::arange(total), alone, {0.75, policy});
    const Routing ours = limited(routing_of(here(expert_TK), here(weight)), number_T, world, {0.75, policy});
    EXPECT_EQ(ours.capacity, whole.capacity);
    EXPECT_TRUE(ours.expert_TK.equal(here(whole.expert_TK)));
    EXPECT_TRUE(whole.expert_TK.eq(kExperts).any().item<bool>());
    EXPECT_EQ(ours.count_E.sum().item<int64_t>(), ours.expert_TK.lt(kExperts).sum().item<int64_t>());
  }
}

}  // namespace
}  // namespace upcycle
