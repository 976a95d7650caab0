#include "parallel/communicator.hpp"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <numeric>
#include <thread>

#include "base/error.hpp"
#include "parallel/mesh.hpp"

namespace upcycle {
namespace {

/// What rank `rank` holds: every rank can compute all of them, and so the serial answer.
Tensor held(int rank, at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat) {
  auto generator = at::make_generator<at::CPUGeneratorImpl>(static_cast<uint64_t>(100 + rank));
  return at::randn(sizes, generator, at::TensorOptions(at::kFloat)).mul_(8).to(dtype);
}

/// Sum in the order of ranks, in fp32 where the dtype is narrower, rounded once.
Tensor serial_sum(int size, at::IntArrayRef sizes, at::ScalarType dtype = at::kFloat) {
  const bool narrow = dtype == at::kBFloat16 || dtype == at::kHalf;
  Tensor sum = held(0, sizes, dtype).to(narrow ? at::kFloat : dtype);
  for (int rank = 1; rank < size; ++rank) sum = sum + held(rank, sizes, dtype).to(sum.scalar_type());
  return sum.to(dtype);
}

class Ranks : public testing::TestWithParam<int64_t> {  // the parameter: bytes of one piece
 protected:
  void SetUp() override { Communicator::piece_bytes = GetParam(); }
  void TearDown() override { Communicator::piece_bytes = Communicator::kPieceBytes; }
  const Communicator world = Communicator::everyone();
  const int rank = world.rank(), size = world.size();
};
// 24 bytes: six floats, three doubles, so that pieces end in the middle of everything.
INSTANTIATE_TEST_SUITE_P(Pieces, Ranks, testing::Values(Communicator::kPieceBytes, 24, 1000));

TEST_P(Ranks, AllReduceIsTheSerialSumBitForBit) {
  for (const at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf, at::kLong, at::kInt}) {
    for (const int64_t count : {0, 1, 2, 3, 5, 127, 4099}) {
      Tensor x = held(rank, {count}, dtype);
      world.all_reduce(x);
      EXPECT_TRUE(at::equal(x, serial_sum(size, {count}, dtype))) << c10::toString(dtype) << " x " << count;
    }
  }
}

TEST_P(Ranks, AllReduceMaxAndMin) {
  Tensor largest = held(rank, {3, 37}), smallest = held(rank, {3, 37});
  Tensor expected_max = held(0, {3, 37}), expected_min = expected_max;
  for (int r = 1; r < size; ++r) {
    expected_max = expected_max.maximum(held(r, {3, 37}));
    expected_min = expected_min.minimum(held(r, {3, 37}));
  }
  world.all_reduce(largest, Reduce::max);
  world.all_reduce(smallest, Reduce::min);
  EXPECT_TRUE(at::equal(largest, expected_max));
  EXPECT_TRUE(at::equal(smallest, expected_min));
}

TEST_P(Ranks, AllGatherAlongEveryDim) {
  for (const int64_t dim : {0, 1, 2, -1}) {
    std::vector<Tensor> all;
    for (int r = 0; r < size; ++r) all.push_back(held(r, {2, 3, 5}, at::kBFloat16));
    EXPECT_TRUE(at::equal(world.all_gather(held(rank, {2, 3, 5}, at::kBFloat16), dim), at::cat(all, dim))) << dim;
  }
  EXPECT_EQ(world.all_gather(at::full({1}, true, at::kBool), 0).sizes(), at::IntArrayRef({size}));
  EXPECT_EQ(world.all_gather(at::empty({0, 4}), 0).sizes(), at::IntArrayRef({0, 4}));
}

TEST_P(Ranks, InPlaceAreReduceScatterAndAllGather) {
  for (const int64_t part : {0, 1, 3, 129}) {
    Tensor x = held(rank, {part * size});
    world.reduce_into_own_part(x);
    const Tensor sum = serial_sum(size, {part * size});
    EXPECT_TRUE(at::equal(x.narrow(0, rank * part, part), sum.narrow(0, rank * part, part))) << part;
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      Tensor own = at::zeros({part * size}, dtype);
      own.narrow(0, rank * part, part).copy_(sum.narrow(0, rank * part, part));
      world.gather_from_own_part(own);
      EXPECT_TRUE(at::equal(own, sum.to(dtype))) << part;
    }
  }
  Tensor odd = at::zeros({size + 1});
  if (size > 1) {
    EXPECT_THROW(world.reduce_into_own_part(odd), std::logic_error);
  }
}

TEST_P(Ranks, ReduceScatterIsTheRanksPartOfTheSum) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (const int64_t dim : {0, 1, -1}) {
      const std::vector<int64_t> sizes = {2 * size, size, 3 * size};
      const Tensor part = world.reduce_scatter(held(rank, sizes, dtype), dim);
      EXPECT_TRUE(at::equal(part, serial_sum(size, sizes, dtype).chunk(size, dim)[rank])) << dim;
      EXPECT_TRUE(part.is_contiguous());
    }
  }
}

TEST_P(Ranks, AllToAllWithUnevenAndZeroRows) {
  // Rank s sends (s * 3 + r * 5) % 4 rows to rank r: some pairs exchange nothing. With `idle`, the last rank has no
  // rows at all.
  for (const bool idle : {false, true}) {
    const auto rows = [&](int from, int to) -> int64_t {
      return idle && from == size - 1 ? 0 : (from * 3 + to * 5) % 4;
    };
    const auto row_from = [](int from, int to, int64_t row) { return from * 1000.0 + to * 100.0 + row; };
    std::vector<int64_t> send, receive;
    std::vector<Tensor> out, in;
    for (int r = 0; r < size; ++r) {
      send.push_back(rows(rank, r));
      receive.push_back(rows(r, rank));
      for (int64_t i = 0; i < send.back(); ++i) out.push_back(at::full({7}, row_from(rank, r, i)));
      for (int64_t i = 0; i < receive.back(); ++i) in.push_back(at::full({7}, row_from(r, rank, i)));
    }
    const Tensor x = out.empty() ? at::empty({0, 7}) : at::stack(out);
    const auto sent = Communicator::one_each(send), received = Communicator::one_each(receive);
    const Tensor y = world.all_to_all(x, sent, received);
    const Tensor expected = in.empty() ? at::empty({0, 7}) : at::stack(in);
    EXPECT_EQ(y.sizes(), expected.sizes());
    EXPECT_TRUE(at::equal(y, expected));
    EXPECT_TRUE(at::equal(world.all_to_all(y, received, sent), x)) << "the reverse brings every row home";
  }
}

// Several runs for each rank, which leave ordered by (receiver, lane) and arrive ordered by (lane, sender), as rows come to experts.
TEST_P(Ranks, AllToAllOfRunsArrivesInTheOrderAsked) {
  const int lanes = 3;
  const auto rows = [](int from, int to, int lane) -> int64_t { return (from + 2 * to + 3 * lane) % 4; };
  const auto run = [&](int from, int to, int lane) { return at::full({rows(from, to, lane), 5}, from * 100.0 + to * 10.0 + lane); };
  std::vector<Communicator::Run> sent, received;
  std::vector<Tensor> out, in;
  for (int to = 0; to < size; ++to) {
    for (int lane = 0; lane < lanes; ++lane) {
      sent.push_back({to, rows(rank, to, lane)});
      out.push_back(run(rank, to, lane));
    }
  }
  for (int lane = 0; lane < lanes; ++lane) {
    for (int from = 0; from < size; ++from) {
      received.push_back({from, rows(from, rank, lane)});
      in.push_back(run(from, rank, lane));
    }
  }
  const Tensor x = at::cat(out), y = world.all_to_all(x, sent, received);
  EXPECT_TRUE(at::equal(y, at::cat(in)));
  EXPECT_TRUE(at::equal(world.all_to_all(y, received, sent), x)) << "the reverse brings every row home";
}

TEST_P(Ranks, BroadcastFromEveryRoot) {
  for (int root = 0; root < size; ++root) {
    Tensor x = held(rank, {11, 3});
    world.broadcast(x, root);
    EXPECT_TRUE(at::equal(x, held(root, {11, 3})));
  }
}

TEST_P(Ranks, SendAndReceiveAroundARing) {
  if (size == 1) GTEST_SKIP() << "needs two ranks";
  const int next = (rank + 1) % size, before = (rank + size - 1) % size;
  Tensor x = at::empty({13, 5});
  if (rank == 0) {
    world.send(held(rank, {13, 5}), next);
    world.receive(x, before);
  } else {
    world.receive(x, before);
    world.send(held(rank, {13, 5}), next);
  }
  EXPECT_TRUE(at::equal(x, held(before, {13, 5})));
}

TEST_P(Ranks, NeighboursSendToEachOtherAtOnce) {
  if (size == 1) GTEST_SKIP() << "needs two ranks";
  const int next = (rank + 1) % size, before = (rank + size - 1) % size;
  const auto message = [](int from, int kind) { return held(from * 2 + kind, {4000 + from, 5 + kind}); };   // too long to be buffered
  std::vector<Communicator::Message> sent{{next, message(rank, 0)}, {before, message(rank, 1)}};
  std::vector<Communicator::Message> received{{before, at::empty({4000 + before, 5})}, {next, at::empty({4000 + next, 6})}};
  world.send_receive(sent, received);   // on two ranks, two messages each way: they keep their order
  EXPECT_TRUE(at::equal(received[0].x, message(before, 0)));
  EXPECT_TRUE(at::equal(received[1].x, message(next, 1)));
  world.send_receive({}, {});
  if (rank == 0) {
    world.send_receive(std::span(sent).first(1), {});
  } else if (rank == 1) {
    received[0].x.zero_();
    world.send_receive({}, std::span(received).first(1));
    EXPECT_TRUE(at::equal(received[0].x, message(0, 0)));
  }
}

TEST_P(Ranks, TextOfAnyLength) {
  const std::string mine(static_cast<size_t>(rank * 700), static_cast<char>('a' + rank));
  const std::vector<std::string> all = world.all_gather(mine);
  for (int r = 0; r < size; ++r) {
    EXPECT_EQ(all[static_cast<size_t>(r)], std::string(static_cast<size_t>(r * 700), static_cast<char>('a' + r)));
  }
  EXPECT_EQ(world.broadcast(mine + "!", size - 1), all.back() + "!");
}

TEST(Communicator, HostNumbers) {
  const Communicator world = Communicator::everyone();
  const int64_t n = world.size();
  EXPECT_EQ(world.all_reduce(world.rank() + (int64_t{1} << 40), Reduce::sum), n * (n - 1) / 2 + n * (int64_t{1} << 40));
  EXPECT_EQ(world.all_reduce(world.rank(), Reduce::max), n - 1);
  EXPECT_EQ(world.all_reduce(world.rank(), Reduce::min), 0);
  std::vector<int64_t> squares(static_cast<size_t>(n));
  for (int64_t r = 0; r < n; ++r) squares[static_cast<size_t>(r)] = r * r;
  EXPECT_EQ(world.all_gather(int64_t{world.rank()} * world.rank()), squares);
  world.barrier();
}

TEST(Communicator, RepeatedSumsDoNotDependOnTiming) {
  const Communicator world = Communicator::everyone();
  for (const int64_t count : {3, 100000}) {  // one exchange, and two
    const Tensor expected = serial_sum(world.size(), {count});
    for (int repetition = 0; repetition < 5; ++repetition) {
      std::this_thread::sleep_for(std::chrono::milliseconds((world.rank() * 7 + repetition * 3) % 11));
      Tensor x = held(world.rank(), {count});
      world.all_reduce(x);
      ASSERT_TRUE(at::equal(x, expected)) << count << " elements, repetition " << repetition;
    }
  }
}

TEST(Communicator, SplitsIntoGroups) {
  const Communicator world = Communicator::everyone();
  const Communicator parity = world.split(world.rank() % 2, -world.rank());  // the key turns the order round
  const int members = world.size() / 2 + (world.rank() % 2 == 0 ? world.size() % 2 : 0);
  ASSERT_EQ(parity.size(), members);
  EXPECT_EQ(parity.rank(), members - 1 - world.rank() / 2);
  Tensor x = at::full({2}, world.rank(), at::kLong);
  parity.all_reduce(x);
  int64_t sum = 0;
  for (int r = world.rank() % 2; r < world.size(); r += 2) sum += r;
  EXPECT_TRUE(at::equal(x, at::full({2}, sum, at::kLong)));
}

TEST(Communicator, AGroupOfOneReturnsItsArgument) {
  const Communicator alone;
  EXPECT_EQ(alone.rank(), 0);
  EXPECT_EQ(alone.size(), 1);
  Tensor x = at::arange(6).view({2, 3});
  EXPECT_TRUE(alone.all_gather(x, 1).is_same(x));
  EXPECT_TRUE(alone.reduce_scatter(x, 1).is_same(x));
  const auto rows = Communicator::one_each(std::vector<int64_t>{2});
  EXPECT_TRUE(alone.all_to_all(x, rows, rows).is_same(x));
  alone.all_reduce(x);
  alone.broadcast(x, 0);
  EXPECT_TRUE(at::equal(x, at::arange(6).view({2, 3})));
  alone.barrier();
  EXPECT_EQ(alone.all_reduce(5, Reduce::sum), 5);
  EXPECT_EQ(alone.all_gather(7), std::vector<int64_t>{7});
  EXPECT_EQ(alone.broadcast("a", 0), "a");
  EXPECT_EQ(alone.all_gather("a"), std::vector<std::string>{"a"});
  EXPECT_THROW(alone.together([] { fail("alone"); }), UserError);
  EXPECT_EQ(alone.split(0, 0).size(), 1);
}

TEST(Communicator, TogetherThrowsTheLowestRanksErrorEverywhere) {
  const Communicator world = Communicator::everyone();
  const int first = world.size() > 1 ? 1 : 0;
  const auto caught = [&](auto action) {
    try {
      world.together(action);
    } catch (const UserError& error) {
      return text("user: ", error.what());
    } catch (const std::exception& error) {
      return text("fault: ", error.what());
    }
    return std::string("nothing");
  };
  EXPECT_EQ(caught([] {}), "nothing");
  EXPECT_EQ(caught([&] {
              if (world.rank() >= first) fail(world.rank(), " has no file");
            }),
            first > 0 ? text("user: rank ", first, ": ", first, " has no file") : "user: 0 has no file");
  EXPECT_EQ(caught([&] {
              if (world.rank() == world.size() - 1) throw std::runtime_error("disk on fire");
            }),
            world.size() > 1 ? text("fault: rank ", world.size() - 1, ": disk on fire") : "fault: disk on fire");
  if (world.size() > 1) {
    EXPECT_EQ(caught([&] {
                if (world.rank() == 1) throw 42;
              }),
              "fault: rank 1: an exception of an unknown type");
  }
  EXPECT_EQ(world.all_reduce(1, Reduce::sum), world.size()) << "the group works on after an error";
}

TEST(Communicator, RefusesWhatItCannotMove) {
  const Communicator world = Communicator::everyone();
  if (world.size() == 1) GTEST_SKIP() << "a group of one moves nothing";
  Tensor turned = at::zeros({3, 4}).t();
  Tensor flags = at::zeros({4}, at::kBool), rows = at::zeros({4, 2}), odd = at::zeros({2 * world.size() + 1, 2});
  EXPECT_THROW(world.all_reduce(turned), std::logic_error);
  EXPECT_THROW(world.all_gather(turned, 0), std::logic_error);
  EXPECT_THROW(world.broadcast(turned, 0), std::logic_error);
  EXPECT_THROW(world.all_reduce(flags), std::logic_error);
  EXPECT_THROW(world.reduce_scatter(odd, 0), std::logic_error);
  const std::vector<Communicator::Run> too_few = {{0, 3}}, nobody = {{world.size(), 4}}, all = {{world.rank(), 4}}, negative = {{0, 5}, {0, -1}};
  EXPECT_THROW(world.all_to_all(rows, too_few, too_few), std::logic_error);
  EXPECT_THROW(world.all_to_all(rows, nobody, all), std::logic_error);
  EXPECT_THROW(world.all_to_all(rows, all, nobody), std::logic_error);
  EXPECT_THROW(world.all_to_all(rows, negative, all), std::logic_error);
  EXPECT_THROW(world.send(rows, world.rank()), std::logic_error);
  EXPECT_THROW(world.receive(rows, world.size()), std::logic_error);
  EXPECT_EQ(world.all_reduce(1, Reduce::sum), world.size());
}

TEST(Communicator, FaultsOfMpiNameTheCall) {
  const Communicator world = Communicator::everyone();
  if (world.size() == 1) GTEST_SKIP() << "needs two ranks";
  const auto refusal = [](auto action) {
    try {
      action();
    } catch (const std::runtime_error& error) {
      return std::string(error.what());
    }
    return std::string("nothing");
  };
  Tensor x = at::zeros({8});
  if (world.rank() == 0) world.send(x, 1);
  if (world.rank() == 1) {  // more than fits
    Tensor small = at::zeros({4});
    EXPECT_NE(refusal([&] { world.receive(small, 0); }).find("MPI_Recv: MPI_ERR_TRUNCATE"), std::string::npos);
  }
  if (world.rank() == 0) world.send(x, 1);
  if (world.rank() == 1) {  // fewer than asked for
    Tensor large = at::zeros({16});
    EXPECT_EQ(refusal([&] { world.receive(large, 0); }), "rank 0 of the group sent 32 bytes where 64 were expected");
  }
  if (world.size() == 2) {  // ranks that disagree on the size of what they exchange
    const Tensor own = at::zeros({world.rank() == 0 ? 8 : 16});
    EXPECT_EQ(refusal([&] { world.all_gather(own, 0); }),
              world.rank() == 0 ? "MPI_Waitall: MPI_ERR_TRUNCATE: message truncated"
                                : "rank 0 of the group sent 32 bytes where 64 were expected");
  }
  EXPECT_NE(refusal([&] {
              Tensor y = at::zeros({2});
              world.broadcast(y, world.size());
            }).find("MPI_Bcast: MPI_ERR_ROOT"),
            std::string::npos);
  EXPECT_EQ(world.all_reduce(1, Reduce::sum), world.size());
}

TEST(Communicator, NcclAsksForTwoRanksAndItsLibrary) {
  Communicator alone;
  alone.use_nccl();
  EXPECT_FALSE(alone.has_nccl()) << "a group of one needs none";
}

}  // namespace
}  // namespace upcycle
