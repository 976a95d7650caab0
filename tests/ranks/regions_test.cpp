#include "parallel/regions.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <functional>
#include <numeric>

#include "base/autograd.hpp"

// Each region is held against its serial formula, in which every rank's input is a leaf of one graph on this rank:
//   loss = sum over ranks r of sum(weight_r * y_r),  y_r = what the region gives rank r.
// The gradient of rank r's input in that graph is what the region's backward must give rank r.
// Doubles that are small whole numbers: every sum is exact, so the comparison is bit for bit.
namespace upcycle {
namespace {

Tensor whole_numbers(uint64_t seed, at::IntArrayRef sizes) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  return at::randn(sizes, generator, at::TensorOptions(at::kDouble)).mul_(10).round_();
}

using Serial = std::function<std::vector<Tensor>(const std::vector<Tensor>& inputs)>;
using Region = std::function<Tensor(const Tensor& input)>;

class Regions : public testing::Test {
 protected:
  const Communicator world = Communicator::everyone();
  const int rank = world.rank(), size = world.size();

  /// `sizes(r)`: the shape of rank r's input.
  void check(const std::function<std::vector<int64_t>(int)>& sizes, const Region& region, const Serial& serial) {
    std::vector<Tensor> inputs;
    for (int r = 0; r < size; ++r)
      inputs.push_back(whole_numbers(10 + static_cast<uint64_t>(r), sizes(r)).requires_grad_());
    const std::vector<Tensor> expected = serial(inputs);
    Tensor loss = at::zeros({}, at::kDouble);
    std::vector<Tensor> weights;
    for (int r = 0; r < size; ++r) {
      const Tensor& y = expected[static_cast<size_t>(r)];
      weights.push_back(whole_numbers(50 + static_cast<uint64_t>(r), y.sizes()));
      loss = loss + (weights.back() * y).sum();
    }
    loss.backward();

    const Tensor mine = inputs[static_cast<size_t>(rank)].detach().clone().requires_grad_();
    const Tensor before = mine.detach().clone();
    const Tensor y = region(mine);
    ASSERT_EQ(y.sizes(), expected[static_cast<size_t>(rank)].sizes());
    EXPECT_TRUE(at::equal(y.detach(), expected[static_cast<size_t>(rank)].detach())) << "forward";
    (weights[static_cast<size_t>(rank)] * y).sum().backward();
    ASSERT_TRUE(mine.grad().defined());
    EXPECT_TRUE(at::equal(mine.grad(), inputs[static_cast<size_t>(rank)].grad())) << "backward";
    EXPECT_TRUE(at::equal(mine.detach(), before)) << "the argument is left alone";
  }

  static std::function<std::vector<int64_t>(int)> all(std::vector<int64_t> sizes) {
    return [sizes](int) { return sizes; };
  }
  Tensor sum(const std::vector<Tensor>& inputs) {
    return std::accumulate(inputs.begin() + 1, inputs.end(), inputs[0],
                           [](const Tensor& a, const Tensor& b) { return a + b; });
  }
};

TEST_F(Regions, GatherAlong) {
  for (const int64_t dim : {0, 1, 2}) {
    check(
        all({2, 3, 4}), [&](const Tensor& x) { return gather_along(world, x, dim); },
        [&](const std::vector<Tensor>& x) { return std::vector<Tensor>(x.size(), at::cat(x, dim)); });
  }
}

TEST_F(Regions, SomethingIsDoneWhileRowsAreGathered) {
  int times = 0;
  check(
      all({2, 3}), [&](const Tensor& x) { return gather_along(world, x, 0, [&] { ++times; }); },
      [&](const std::vector<Tensor>& x) { return std::vector<Tensor>(x.size(), at::cat(x, 0)); });
  EXPECT_EQ(times, size > 1 ? 1 : 0);
  times = 0;
  const Tensor x = whole_numbers(1, {2, 6, 3});
  EXPECT_TRUE(gather_sequence(world, x, [&] { ++times; }).equal(gather_sequence(world, x)));
  EXPECT_EQ(times, size > 1 ? 1 : 0);
}
TEST_F(Regions, ReduceScatterAlong) {
  for (const int64_t dim : {0, 1, 2}) {
    check(
        all({2 * size, size, 3 * size}), [&](const Tensor& x) { return reduce_scatter_along(world, x, dim); },
        [&](const std::vector<Tensor>& x) { return sum(x).chunk(size, dim); });
  }
}

TEST_F(Regions, GatherSequence) {
  // Chunks 0 .. size-1 are the first halves of what the ranks hold, in their order; the others their second halves, backwards.
  check(
      all({2, 6, 3}), [&](const Tensor& x) { return gather_sequence(world, x); },
      [&](const std::vector<Tensor>& x) {
        std::vector<Tensor> chunks;
        for (int r = 0; r < size; ++r) chunks.push_back(x[static_cast<size_t>(r)].narrow(1, 0, 3));
        for (int r = size - 1; r >= 0; --r) chunks.push_back(x[static_cast<size_t>(r)].narrow(1, 3, 3));
        return std::vector<Tensor>(x.size(), at::cat(chunks, 1));
      });
}

TEST_F(Regions, ExchangeWithRanksThatHaveNoRows) {
  using Rows = std::function<int64_t(int from, int to)>;
  const std::vector<Rows> plans = {
      [](int from, int to) -> int64_t { return (from * 3 + to * 5) % 4; },
      [&](int from, int to) -> int64_t { return from == size - 1 ? 0 : 1 + to; },  // the last rank sends nothing
      [](int from, int to) -> int64_t { return to == 0 ? from + 1 : 0; },          // only rank 0 receives
      [](int, int) -> int64_t { return 0; },                                       // nobody has anything
  };
  for (const Rows& rows : plans) {
    const auto sent = [&](int from) {
      int64_t total = 0;
      for (int to = 0; to < size; ++to) total += rows(from, to);
      return total;
    };
    Splits splits;
    for (int r = 0; r < size; ++r) {
      splits.send.push_back({r, rows(rank, r)});
      splits.receive.push_back({r, rows(r, rank)});
    }
    check(
        [&](int r) {
          return std::vector<int64_t>{sent(r), 3};
        },
        [&](const Tensor& x) { return exchange(world, x, splits); },
        [&](const std::vector<Tensor>& x) {
          std::vector<Tensor> y;
          for (int to = 0; to < size; ++to) {
            std::vector<Tensor> arrived;
            for (int from = 0; from < size; ++from) {
              int64_t begin = 0;
              for (int other = 0; other < to; ++other) begin += rows(from, other);
              arrived.push_back(x[static_cast<size_t>(from)].narrow(0, begin, rows(from, to)));
            }
            y.push_back(at::cat(arrived, 0));
          }
          return y;
        });
  }
}

TEST_F(Regions, UnevenRows) {
  using Plan = std::function<int64_t(int rank)>;
  const std::vector<Plan> plans = {
      [](int r) -> int64_t { return 2 + 3 * r; },
      [&](int r) -> int64_t { return r == size - 1 ? 0 : 4; },  // the last rank has none
      [](int r) -> int64_t { return r == 0 ? 5 : 0; },          // only rank 0 has some
      [](int) -> int64_t { return 3; },
      [](int) -> int64_t { return 0; },
  };
  for (const Plan& plan : plans) {
    Rows rows;
    for (int r = 0; r < size; ++r) rows.push_back(plan(r));
    const int64_t total = std::accumulate(rows.begin(), rows.end(), int64_t{0});
    check(
        [&](int r) {
          return std::vector<int64_t>{plan(r), 3, 2};
        },
        [&](const Tensor& x) { return gather_rows(world, x, rows); },
        [&](const std::vector<Tensor>& x) { return std::vector<Tensor>(x.size(), at::cat(x, 0)); });
    check(
        all({total, 3}), [&](const Tensor& x) { return reduce_scatter_rows(world, x, rows); },
        [&](const std::vector<Tensor>& x) { return sum(x).split_with_sizes(rows, 0); });
  }
}

TEST_F(Regions, AStridedArgumentAndGradientTravelWell) {
  const Tensor x = whole_numbers(10 + static_cast<uint64_t>(rank), {4, 3}).requires_grad_();
  const Tensor y = gather_along(world, x.t(), 0);  // [3 * size, 4], from a transposed view
  y.t().contiguous().sum().backward();             // dy is an expanded scalar, of stride 0
  EXPECT_TRUE(at::equal(x.grad(), at::empty({4, 3}, at::kDouble).fill_(size)));
}

TEST_F(Regions, NothingIsRecordedWithoutAGraph) {
  const Unrecorded guard;
  const Tensor x = whole_numbers(1, {2 * size, 2});
  EXPECT_FALSE(reduce_scatter_along(world, x, 0).requires_grad());
  EXPECT_FALSE(gather_along(world, x, 0).requires_grad());
}

TEST_F(Regions, AGroupOfOneReturnsItsArgument) {
  const Communicator alone;
  const Tensor x = whole_numbers(1, {2, 2}).requires_grad_();
  for (const Tensor& y :
       {gather_along(alone, x, 0), reduce_scatter_along(alone, x, 0), gather_sequence(alone, x), exchange(alone, x, {{{0, 2}}, {{0, 2}}}), gather_rows(alone, x, {2}), reduce_scatter_rows(alone, x, {2})}) {
    EXPECT_TRUE(y.is_same(x));
  }
}

TEST_F(Regions, RefusesSlicesThatDoNotDivide) {
  if (size == 1) GTEST_SKIP() << "one rank divides everything";
  EXPECT_THROW(reduce_scatter_along(world, at::zeros({2 * size + 1}), 0), std::logic_error);
  EXPECT_THROW(gather_rows(world, at::zeros({3}), Rows(static_cast<size_t>(size), 2)), std::logic_error);
  EXPECT_THROW(reduce_scatter_rows(world, at::zeros({2 * size + 1}), Rows(static_cast<size_t>(size), 2)), std::logic_error);
}

}  // namespace
}  // namespace upcycle
