// Every op on the GPU against the CPU: values, gradients, main_grad. The CPU's side is held against fp64 in tests/unit/ops.
#include <ATen/Context.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/randint.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>

#include "moe/moe_layer.hpp"
#include "ops/adamw.hpp"
#include "ops/attention.hpp"
#include "ops/embedding.hpp"
#include "ops/grouped_matmul.hpp"
#include "ops/linear.hpp"
#include "ops/permute.hpp"
#include "ops/qk_norm_rope.hpp"
#include "ops/rms_norm.hpp"
#include "ops/rope.hpp"
#include "ops/swiglu.hpp"
#include "support/numbers.hpp"

namespace upcycle {
namespace {

/// Where an op runs, and in what. The numbers are the same everywhere: those of `rounded`, which the CPU takes as fp32.
struct Place {
  at::Device device;
  at::ScalarType dtype, rounded;
  Tensor draw(const Shape& shape, uint64_t seed) const { return normal(shape, seed).to(rounded).to(dtype).to(device); }
  Tensor input(const Shape& shape, uint64_t seed) const { return draw(shape, seed).requires_grad_(); }
  Parameter weight(const Shape& shape, uint64_t seed) const { return trained(draw(shape, seed)); }
};

using Results = std::vector<Tensor>;
using Case = std::function<Results(const Place&)>;

/// `roundings`: how often a bf16 number is rounded on its way, each by at most 2^-8 of an element.
void expect_same(const Case& run, int roundings, double fp32 = 5e-6) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    SCOPED_TRACE(dtype == at::kFloat ? "fp32" : "bf16");
    const Results gpu = run({at::Device(at::kCUDA, 0), dtype, dtype}), cpu = run({at::kCPU, at::kFloat, dtype});
    ASSERT_EQ(gpu.size(), cpu.size());
    for (size_t i = 0; i < gpu.size(); ++i) {
      EXPECT_TRUE(gpu[i].is_cuda()) << "result " << i;
      EXPECT_LE(distance(gpu[i], cpu[i]), dtype == at::kFloat ? fp32 : roundings * 0x1p-8) << "result " << i;
    }
  }
}

/// y and all gradients, after two passes of backward into the weights.
Results with_gradients(const Place& place, const std::function<Tensor(const Results& x, std::vector<Parameter>& w)>& op,
                       const std::vector<Shape>& inputs, const std::vector<Shape>& weights) {
  std::vector<Parameter> w;
  for (size_t i = 0; i < weights.size(); ++i) w.push_back(place.weight(weights[i], 900 + i));
  for (Parameter& parameter : w) {   // as an earlier step has left it, a bad one
    parameter.main_grad.fill_(NAN);
    parameter.outdated = true;
  }
  Results out;
  for (uint64_t pass = 0; pass < 2; ++pass) {
    Results x;
    for (size_t i = 0; i < inputs.size(); ++i) x.push_back(place.input(inputs[i], 10 * i + pass));
    const Tensor y = op(x, w);
    // The loss is fp32 on all places; every other output takes a gradient of its own dtype.
    run_backward(y, normal(y.sizes().vec(), 77 + pass).to(place.rounded).to(y.scalar_type()).to(place.device));
    out.push_back(y.detach());
    for (const Tensor& input : x) out.push_back(input.grad());
  }
  for (const Parameter& parameter : w) out.push_back(parameter.main_grad);
  return out;
}

TEST(OpsOnGpu, Linear) {
  for (const auto& [rows, in, out] : {std::tuple{7, 13, 5}, {0, 13, 5}, {257, 64, 128}}) {
    expect_same([&](const Place& p) {
      return with_gradients(p, [](const auto& x, auto& w) { return linear(x[0], w[0]); }, {{rows, in}}, {{out, in}});
    }, 1);
  }
}

TEST(OpsOnGpu, RmsNorm) {
  for (const Shape& shape : {Shape{5, 33}, Shape{2, 9, 3, 128}, Shape{0, 7}}) {
    expect_same([&](const Place& p) {
      return with_gradients(p, [](const auto& x, auto& w) { return rms_norm(x[0], w[0], 1e-6); }, {shape}, {{shape.back()}});
    }, 2);
  }
}

TEST(OpsOnGpu, RmsNormBehindASum) {
  for (const Shape& shape : {Shape{5, 33}, Shape{2, 9, 128}, Shape{0, 7}}) {
    expect_same([&](const Place& p) {
      return with_gradients(p, [](const auto& x, auto& w) {
        const auto [sum, norm] = add_rms_norm(x[0], x[1], w[0], 1e-6);
        return sum * norm;
      }, {shape, shape}, {{shape.back()}});
    }, 5);
  }
}

TEST(OpsOnGpu, QkNormRope) {
  for (const auto& [positions, heads, groups, width] : {std::tuple{33, 4, 2, 16}, {129, 3, 1, 128}, {9, 2, 2, 10}}) {
    expect_same([&](const Place& p) {
      const HeadColumns columns = {2, heads, groups, 1e-6, rotary_table(positions, width, 1e6, p.device)};
      return with_gradients(p, [&](const auto& x, auto& w) {
        const auto [q, k, v] = qk_norm_rope(x[0], w[0], w[1], columns);
        return at::cat({q, k, v}, 2);
      }, {{2 * positions, (heads + 2 * groups) * width}}, {{width}, {width}});
    }, 3);
  }
}

TEST(OpsOnGpu, Swiglu) {
  for (const Shape& shape : {Shape{5, 34}, Shape{2, 9, 256}, Shape{0, 8}}) {
    expect_same([&](const Place& p) { return with_gradients(p, [](const auto& x, auto&) { return swiglu(x[0]); }, {shape}, {}); }, 2);
  }
  for (const auto& [rows, width] : {std::pair{5, 34}, {19, 256}, {0, 8}}) {
    expect_same([&](const Place& p) {
      return with_gradients(p, [](const auto& x, auto&) { return swiglu(x[0], x[1].to(at::kFloat)); }, {{rows, width}, {rows, 1}}, {});
    }, 2);
  }
}

TEST(OpsOnGpu, Rope) {
  for (const Shape& shape : {Shape{2, 33, 3, 10}, Shape{1, 129, 4, 128}}) {
    expect_same([&](const Place& p) {
      const RotaryTable table = rotary_table(shape[1], shape[3], 1e6, p.device);
      return with_gradients(p, [&](const auto& x, auto&) { return rotate(x[0], table); }, {shape}, {});
    }, 1);
  }
}

TEST(OpsOnGpu, Attention) {
  for (const auto& [length, heads, groups, width] : {std::tuple{9, 4, 4, 16}, {65, 8, 1, 64}, {130, 16, 2, 128}, {257, 4, 2, 128}}) {
    SCOPED_TRACE(testing::Message() << length << " positions, " << heads << "/" << groups << " heads of " << width);
    const Shape q = {2, length, heads, width}, kv = {2, length, groups, width};
    expect_same([&](const Place& p) {
      return with_gradients(p, [](const auto& x, auto&) { return attention(x[0], x[1], x[2]).out_BSHD; }, {q, kv, kv}, {});
    }, 3);
    expect_same([&](const Place& p) {
      return Results{attention(p.draw(q, 1), p.draw(kv, 2), p.draw(kv, 3)).log_sum_exp_BHS};
    }, 1);
  }
}

TEST(OpsOnGpu, GroupedMatmul) {
  // Rows of whole 16 bytes go through the grouped kernel, others expert by expert; experts without rows in both.
  for (const auto& [in, out] : {std::pair{64, 48}, {40, 8}, {7, 9}}) {
    for (const std::vector<int>& ends : {std::vector<int>{16, 16, 53, 54}, {0, 0, 0, 20}, {3, 3, 3, 3}, {0, 0, 0, 0}}) {
      SCOPED_TRACE(testing::Message() << in << " -> " << out << ", " << ends.back() << " rows");
      Tensor end = at::empty({4}, at::kInt);
      std::copy(ends.begin(), ends.end(), end.mutable_data_ptr<int32_t>());
      expect_same([&](const Place& p) {
        const Tensor end_E = end.to(p.device);
        return with_gradients(p, [&](const auto& x, auto& w) { return grouped_matmul(x[0], w[0], end_E); }, {{ends.back(), in}}, {{4, out, in}});
      }, 2);  // the kernel's weight gradients are rounded once more
    }
  }
}

TEST(OpsOnGpu, Permute) {
  for (const auto& [tokens, choices, width] : {std::tuple{17, 8, 3}, {1, 1, 1}, {0, 2, 5}, {300, 2, 64}}) {
    const Tensor expert_TK = choose_experts(normal({tokens, 9}, 1), choices);
    const int64_t rows = int64_t{tokens} * choices;
    expect_same([&](const Place& p) {
      const RowOrder order = sort_by_expert(expert_TK.to(p.device), 9);
      Results out = {order.choice_R, order.row_TK};
      const auto add = [&](Results more) { out.insert(out.end(), more.begin(), more.end()); };
      add(with_gradients(p, [&](const auto& x, auto&) { return spread_rows(x[0], order); }, {{tokens, width}}, {}));
      add(with_gradients(p, [&](const auto& x, auto&) { return sum_rows(x[0], order); }, {{rows, width}}, {}));
      add(with_gradients(p, [&](const auto& x, auto&) { return spread_rows(x[0], by_choice(order)); }, {{rows, 1}}, {}));
      add(with_gradients(p, [&](const auto& x, auto&) { return permute_rows(x[0], order.choice_R); }, {{rows, width}}, {}));
      return out;
    }, 1);
  }
}

TEST(OpsOnGpu, Embedding) {
  const auto generator = at::detail::createCPUGenerator(3);
  const Tensor ids = at::randint(37, {3, 51}, generator, at::TensorOptions(at::kLong));
  expect_same([&](const Place& p) {
    const Tensor here = ids.to(p.device);
    return with_gradients(p, [&](const auto&, auto& w) { return embedding(here, w[0]); }, {}, {{37, 9}});
  }, 1);
}

// Documents of one token and many, a document alone, and what context parallelism asks for: keys before the queries, seen twice.
TEST(OpsOnGpu, AttentionSegments) {
  struct Form {
    std::vector<std::vector<Segment>> segments;
    int64_t queries, keys;
  };
  const std::vector<Form> forms = {
      {{{{0, 1, 0, 1}, {1, 70, 1, 70}, {70, 71, 70, 71}, {71, 201, 71, 201}}, {{0, 201, 0, 201}}}, 201, 201},
      {{{{0, 64, 0, 128}, {64, 128, 0, 320}}}, 128, 384},
      {{{{0, 33, 30, 66}, {33, 66, 132, 198}}, {{0, 33, 0, 66}, {33, 65, 164, 197}, {65, 66, 197, 198}}}, 66, 264}};
  for (const auto& [heads, groups, width] : {std::tuple{4, 4, 16}, {8, 1, 64}, {16, 2, 128}, {4, 2, 10}}) {
    for (const Form& f : forms) {
      SCOPED_TRACE(testing::Message() << f.queries << " queries, " << f.keys << " keys, " << heads << "/" << groups << " heads of " << width);
      const Shape q = {2, f.queries, heads, width}, kv = {2, f.keys, groups, width};
      expect_same([&](const Place& p) {
        const Segments segments(f.segments, 2, f.queries, f.keys, p.device);
        return with_gradients(p, [&](const auto& x, auto&) { return attention(x[0], x[1], x[2], segments).out_BSHD; }, {q, kv, kv}, {});
      }, 3);
      expect_same([&](const Place& p) {
        const Segments segments(f.segments, 2, f.queries, f.keys, p.device);
        return Results{attention(p.draw(q, 1), p.draw(kv, 2), p.draw(kv, 3), segments).log_sum_exp_BHS};
      }, 1);
    }
  }
}

// Bit for bit: where a token goes must not depend on the device.
TEST(OpsOnGpu, ChooseExperts) {
  for (const auto& [experts, top_k] : {std::pair{8, 2}, {64, 8}, {128, 8}, {5, 5}}) {
    const Tensor smooth = normal({999, experts}, 1), coarse = (smooth * 2).round() / 2;
    for (const Tensor& logits : {smooth, coarse, -smooth.abs(), at::zeros({33, experts}), at::zeros({0, experts})}) {
      EXPECT_TRUE(choose_experts(logits.cuda(), top_k).cpu().equal(choose_experts(logits, top_k)));
    }
  }
}

TEST(OpsOnGpu, AdamW) {
  const AdamW settings{.lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1};
  const auto run = [&](at::Device device, double skip) {
    const auto scalar = [&](double value) { return at::full({}, value, at::TensorOptions(at::kFloat).device(device)); };
    Results master, gradient, m, v;
    for (const int64_t size : {1, 77, 5000}) {
      master.push_back(normal({size}, 1).to(device));
      gradient.push_back(normal({size}, 2).to(device));
      m.push_back(normal({size}, 3).to(device));
      v.push_back(normal({size}, 4).abs().to(device));
    }
    for (int step = 1; step <= 5; ++step) {
      adamw_step(settings, master, gradient, m, v, scalar(step), scalar(3.0), scalar(skip));
    }
    for (const Results& more : {m, v}) master.insert(master.end(), more.begin(), more.end());
    return master;
  };
  for (const double skip : {0.0, 1.0}) {
    const Results gpu = run(at::Device(at::kCUDA, 0), skip), cpu = run(at::kCPU, skip);
    for (size_t i = 0; i < gpu.size(); ++i) EXPECT_LE(distance(gpu[i], cpu[i]), skip == 1.0 ? 0.0 : 1e-6) << "tensor " << i;
  }
}

TEST(OpsOnGpu, MoeLayer) {
  constexpr int64_t kExperts = 8, kTokens = 61, kHidden = 32, kWidth = 24;
  const Communicator alone;
  const RouterContext context{.balance = {.aux = 0.1, .z = 0.01}};
  expect_same([&](const Place& p) {
    Parameter router = trained(normal({kExperts, kHidden}, 1).to(p.device));  // fp32 in any precision
    Parameter gate_up = p.weight({kExperts, 2 * kWidth, kHidden}, 2), down = p.weight({kExperts, kHidden, kWidth}, 3);
    MoeLayer layer(Router(router, alone, {.top_k = 2}), Dispatcher(alone, alone, {kExperts, 2}), Experts(gate_up, down),
                   alone);
    const Tensor x = p.input({kTokens, kHidden}, 4), y = layer.forward(x, context);
    run_backward(y, p.draw({kTokens, kHidden}, 5));
    return Results{y.detach(), x.grad(), router.main_grad, gate_up.main_grad, down.main_grad, layer.router().statistics().count_E,
                   layer.router().statistics().measures_3};
  }, 4, 2e-5);
}

}  // namespace
}  // namespace upcycle
