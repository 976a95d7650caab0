// Every op of src/ops at the shapes of training steps: forward and backward beside the bytes and FLOPs that they must move and do, and
// beside ATen's own operations with ATen's own gradients.
#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/full.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/randint.h>
#include <ATen/ops/rms_norm.h>
#include <ATen/ops/silu.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/topk.h>
#include <ATen/ops/zeros.h>

#include "bench.hpp"
#include "moe/router.hpp"
#include "ops/adamw.hpp"
#include "ops/attention.hpp"
#include "ops/cross_entropy.hpp"
#include "ops/embedding.hpp"
#include "ops/grouped_matmul.hpp"
#include "ops/linear.hpp"
#include "ops/permute.hpp"
#include "ops/qk_norm_rope.hpp"
#include "ops/rms_norm.hpp"
#include "ops/sums_of_squares.hpp"
#include "ops/swiglu.hpp"

// Shapes: T tokens, K choices of each, R = T*K rows, H width, F width of an expert, V vocabulary; bf16 where nothing else is said.
namespace upcycle::bench {
namespace {

using All = std::vector<Tensor>;
using Differentiable = Bench::Differentiable;
constexpr double kHalf = 2, kSingle = 4, kIndex = 8;   // bytes
constexpr double kEps = 1e-6;

double product(std::initializer_list<int64_t> factors) {
  double out = 1;
  for (const int64_t factor : factors) out *= static_cast<double>(factor);
  return out;
}

void products(Bench& bench, const Sizes& s) {
  const auto one = [&](const std::string& name, int64_t in, int64_t out) {
    Parameter weight = bench.weight({out, in});
    const Tensor x = bench.leaf({s.tokens, in}), w = bench.leaf({out, in});
    const double flops = 2 * product({s.tokens, in, out});
    const double bytes = kHalf * (product({s.tokens, in + out}) + product({in, out}));
    bench.measure(s.name, name, {bytes, flops}, {2 * bytes + 2 * kSingle * product({in, out}), 2 * flops}, {[&] { return All{linear(x, weight)}; }, {x}},
                  Differentiable{[&] { return All{at::linear(x, w)}; }, {x, w}});
  };
  one("q, k, v", s.hidden, (s.heads + 2 * s.kv_heads) * s.head_dim);
  one("attention out", s.heads * s.head_dim, s.hidden);
}

void norms(Bench& bench, const Sizes& s) {
  Parameter weight = bench.weight({s.hidden});
  const Tensor x = bench.leaf({s.tokens, s.hidden}), branch = bench.leaf({s.tokens, s.hidden}), w = bench.leaf({s.hidden});
  const double bytes = kHalf * product({s.tokens, s.hidden});
  bench.measure(s.name, "rms_norm", {2 * bytes, 0}, {3 * bytes, 0}, {[&] { return All{rms_norm(x, weight, kEps)}; }, {x}},
                Differentiable{[&] { return All{at::rms_norm(x, {s.hidden}, w, kEps)}; }, {x, w}});
  const auto ours = [&] {
    const Normed normed = add_rms_norm(x, branch, weight, kEps);
    return All{normed.x_D, normed.norm_D};
  };
  const auto plainly = [&] {
    const Tensor sum = x + branch;
    return All{sum, at::rms_norm(sum, {s.hidden}, w, kEps)};
  };
  bench.measure(s.name, "add_rms_norm", {4 * bytes, 0}, {4 * bytes, 0}, {ours, {x, branch}}, Differentiable{plainly, {x, branch, w}});
}

// ATen's way to rotate: halves in fp32, put together again.
Tensor rotate_plainly(const Tensor& x_BSHD, const RotaryTable& table) {
  const auto halves = x_BSHD.to(at::kFloat).chunk(2, -1), cos = table.cos_SD.unsqueeze(1).chunk(2, -1), sin = table.sin_SD.unsqueeze(1).chunk(2, -1);
  return at::cat({halves[0] * cos[0] - halves[1] * sin[0], halves[1] * cos[0] + halves[0] * sin[0]}, -1).to(x_BSHD.scalar_type());
}

void heads(Bench& bench, const Sizes& s) {
  const int64_t sequences = s.tokens / s.sequence, normed = (s.heads + s.kv_heads) * s.head_dim, values = s.kv_heads * s.head_dim;
  const HeadColumns columns{sequences, s.heads, s.kv_heads, kEps, rotary_table(s.sequence, s.head_dim, 1e6, bench.device)};
  Parameter q_norm = bench.weight({s.head_dim}), k_norm = bench.weight({s.head_dim});
  const Tensor qkv = bench.leaf({s.tokens, normed + values}), w = bench.leaf({s.head_dim});
  const double bytes = kHalf * product({s.tokens, normed}), of_values = kHalf * product({s.tokens, values});
  const auto ours = [&] {
    const Heads made = qk_norm_rope(qkv, q_norm, k_norm, columns);
    return All{made.q_BSHD, made.k_BSGD, made.v_BSGD};
  };
  const auto plainly = [&] {
    const auto parts = qkv.view({sequences, s.sequence, -1, s.head_dim}).split_with_sizes({s.heads, s.kv_heads, s.kv_heads}, 2);
    const auto turned = [&](const Tensor& x) { return rotate_plainly(at::rms_norm(x, {s.head_dim}, w, kEps), columns.rotary); };
    return All{turned(parts[0]), turned(parts[1]), parts[2]};
  };
  bench.measure(s.name, "qk_norm_rope", {2 * bytes, 0}, {3 * bytes + 2 * of_values, 0}, {ours, {qkv}}, Differentiable{plainly, {qkv, w}});
}

void attentions(Bench& bench, const Sizes& s) {
  const int64_t sequences = s.tokens / s.sequence;
  const Tensor q = bench.leaf({sequences, s.sequence, s.heads, s.head_dim}), k = bench.leaf({sequences, s.sequence, s.kv_heads, s.head_dim});
  const Tensor v = bench.leaf({sequences, s.sequence, s.kv_heads, s.head_dim});
  const double flops = 4 * product({sequences, s.heads, s.sequence, s.sequence, s.head_dim}) / 2;   // causal
  const double bytes = kHalf * static_cast<double>(2 * q.numel() + 2 * k.numel());
  const auto by = [&](AttentionKernel kernel) { return Differentiable{[&, kernel] { return All{attention(q, k, v, {}, kernel).out_BSHD}; }, {q, k, v}}; };
  bench.measure(s.name, "attention (ATen: flash)", {bytes, flops}, {2 * bytes, 2.5 * flops}, by(AttentionKernel::automatic), by(AttentionKernel::flash));
}

void routers(Bench& bench, const Sizes& s) {
  const Communicator alone;
  Parameter weight = bench.weight({s.experts, s.hidden}, at::kFloat);
  Router router(weight, alone, {.top_k = s.top_k});
  const Tensor x = bench.leaf({s.tokens, s.hidden}), w = bench.draw({s.experts, s.hidden}, at::kFloat).mul_(0.02).requires_grad_();
  const double bytes = kHalf * product({s.tokens, s.hidden});
  const auto plainly = [&] {
    const Tensor chosen = std::get<0>(at::topk(at::softmax(at::linear(x.to(at::kFloat), w), -1), s.top_k, -1));
    return All{chosen / chosen.sum(-1, true)};
  };
  bench.measure(s.name, "router", {bytes, 0}, {2 * bytes, 0}, {[&] { return All{router.forward(x, {}).weight_TK}; }, {x}}, Differentiable{plainly, {x, w}});
}

/// Choices as a router makes them: the K largest of random logits.
Tensor choices(Bench& bench, const Sizes& s) { return std::get<1>(at::topk(bench.draw({s.tokens, s.experts}, at::kFloat), s.top_k, -1)); }

void rows(Bench& bench, const Sizes& s) {
  const Tensor expert_TK = choices(bench, s);
  const double index = kIndex * product({s.tokens, s.top_k}), token = kHalf * product({s.tokens, s.hidden}), row = token * static_cast<double>(s.top_k);
  bench.measure(s.name, "sort_by_expert", {3 * index, 0}, {{}, [&] { sort_by_expert(expert_TK, s.experts); }},
                Bench::Way{{}, [&] { expert_TK.view({-1}).argsort(/*stable=*/true); }});
  const RowOrder order = sort_by_expert(expert_TK, s.experts);
  const Tensor x = bench.leaf({s.tokens, s.hidden}), y = bench.leaf({s.rows(), s.hidden});
  const Tensor token_R = order.choice_R.div(s.top_k, "floor"), row_N = order.row_TK.view({-1});
  bench.measure(s.name, "spread_rows", {token + row, 0}, {row + token, 0}, {[&] { return All{spread_rows(x, order)}; }, {x}},
                Differentiable{[&] { return All{x.index_select(0, token_R)}; }, {x}});
  const auto plainly = [&] { return All{y.index_select(0, row_N).view({s.tokens, s.top_k, s.hidden}).sum(1)}; };
  bench.measure(s.name, "sum_rows", {row + token, 0}, {row + token, 0}, {[&] { return All{sum_rows(y, order)}; }, {y}}, Differentiable{plainly, {y}});
}

void experts(Bench& bench, const Sizes& s) {
  const Tensor end_E = count_choices(choices(bench, s), s.experts).cumsum(0).to(at::kInt);
  const auto one = [&](const std::string& name, int64_t in, int64_t out) {
    Parameter weight = bench.weight({s.experts, out, in});
    const Tensor x = bench.leaf({s.rows(), in}), w = bench.leaf({s.experts, out, in});
    const double flops = 2 * product({s.rows(), in, out}), bytes = kHalf * (product({s.rows(), in + out}) + product({s.experts, in, out}));
    bench.measure(s.name, name, {bytes, flops}, {2 * bytes + 2 * kSingle * product({s.experts, in, out}), 2 * flops},
                  {[&] { return All{grouped_matmul(x, weight, end_E)}; }, {x}},
                  Differentiable{[&] { return All{at::_grouped_mm(x, w.transpose(1, 2), end_E)}; }, {x, w}});
  };
  one("gate and up of the experts", s.hidden, 2 * s.ffn);
  one("down of the experts", s.ffn, s.hidden);
}

void activations(Bench& bench, const Sizes& s) {
  const Tensor gate_up = bench.leaf({s.rows(), 2 * s.ffn}), weight_R1 = bench.draw({s.rows(), 1}, at::kFloat).abs_().requires_grad_();
  const double bytes = kHalf * product({s.rows(), s.ffn});
  const auto plainly = [&] { return All{(at::silu(gate_up.narrow(-1, 0, s.ffn)) * gate_up.narrow(-1, s.ffn, s.ffn) * weight_R1).to(at::kBFloat16)}; };
  bench.measure(s.name, "swiglu, weighed", {3 * bytes, 0}, {5 * bytes, 0}, {[&] { return All{swiglu(gate_up, weight_R1)}; }, {gate_up, weight_R1}},
                Differentiable{plainly, {gate_up, weight_R1}});
}

void vocabulary(Bench& bench, const Sizes& s) {
  const at::TensorOptions index = at::TensorOptions(at::kLong).device(bench.device);
  {
    Parameter weight = bench.weight({s.vocab, s.hidden});
    const Tensor ids = at::randint(s.vocab, {s.tokens}, index), w = bench.leaf({s.vocab, s.hidden});
    const double row = product({s.tokens, s.hidden});
    bench.measure(s.name, "embedding", {2 * kHalf * row, 0}, {(kHalf + 2 * kSingle) * row, 0}, {[&] { return All{embedding(ids, weight)}; }, {}},
                  Differentiable{[&] { return All{at::embedding(w, ids)}; }, {w}});
  }
  const int64_t part = std::min<int64_t>(s.tokens, 2048);
  Tensor logits;
  const Tensor kept = bench.draw({part, s.vocab}), labels = at::randint(s.vocab, {part}, index);
  const Tensor weight = at::full({part}, 1.0 / static_cast<double>(part), at::TensorOptions(at::kFloat).device(bench.device));
  const auto fresh = [&] { logits = kept.clone(); };   // they become their gradient
  bench.measure(s.name, "cross_entropy and its gradient, 2048 tokens", {2 * kHalf * product({part, s.vocab}), 0},
                {fresh, [&] { cross_entropy(logits, labels, weight); }},
                Bench::Way{fresh, [&] {
                             const SoftmaxSums sums = softmax_sums_written_out(logits, labels);
                             weighted_losses(sums, weight);
                             cross_entropy_gradient_written_out(logits, labels, weight, sums);
                           }});
}

void optimizer(Bench& bench) {
  const int64_t elements = bench.tiny ? 4096 : int64_t{1} << 28;
  const auto single = at::TensorOptions(at::kFloat).device(bench.device);
  const Tensor masters = bench.draw({elements}, at::kFloat), values = masters.to(at::kBFloat16), gradients = bench.draw({elements}, at::kFloat).mul_(1e-3);
  const AdamWBuffer buffer(masters, gradients, at::zeros({elements}, single), at::zeros({elements}, single), values, {{0, elements, 1.0, true}});
  const AdamW settings{.lr = 1e-5, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1};
  const Tensor step = at::ones({}, single), divisor = at::ones({}, single), skip = at::zeros({}, single);
  const std::string shape = std::to_string(elements >> 20) + " M elements";
  const double count = static_cast<double>(elements);
  bench.measure(shape, "AdamW and bf16 values", {30 * count, 0}, {{}, [&] { buffer.step(settings, step, divisor, skip); }},
                Bench::Way{{}, [&] { buffer.step_written_out(settings, step, divisor, skip); }});
  bench.measure(shape, "sums_of_squares", {kSingle * count, 0}, {{}, [&] { sums_of_squares({gradients}, {1.0}); }},
                Bench::Way{{}, [&] { sums_of_squares_written_out({gradients}, {1.0}); }});
}

}  // namespace

void ops(Bench& bench) {
  for (const Sizes& sizes : training_shapes(bench.tiny)) {
    for (const auto part : {products, norms, heads, attentions, routers, rows, experts, activations, vocabulary}) part(bench, sizes);
  }
  optimizer(bench);
}

}  // namespace upcycle::bench
