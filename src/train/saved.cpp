// Per rank: h hidden, q and kv heads * head_dim, f feed-forward width, K experts of width fe a token, E experts, V vocabulary.
#include "train/saved.hpp"

#include <algorithm>

#include "model/vocabulary.hpp"

namespace upcycle {
namespace {

constexpr int64_t kFp32 = 4, kIndex = 8;

/// What one tensor rank holds of every width.
struct Widths {
  Widths(const Architecture& a, const Grid& grid) {
    const int64_t tp = grid.size(Axis::tensor), etp = grid.size(Axis::expert_tensor);
    h = a.hidden;
    heads = a.heads / tp, kv_heads = std::max<int64_t>(1, a.kv_heads / tp);
    q = heads * a.head_dim, kv = kv_heads * a.head_dim;
    f = a.ffn / tp, fe = a.expert_ffn / etp;
    V = (a.vocab + tp - 1) / tp;
    local_experts = a.experts / grid.size(Axis::expert);
  }
  int64_t h, heads, kv_heads, q, kv, f, fe, V, local_experts;
};

/// Rows never leave their rank: backward copies them for the experts again.
bool experts_at_home(const Grid& grid) { return grid.size(Axis::expert) * grid.size(Axis::expert_tensor) == 1; }

}  // namespace

MicroBatch::MicroBatch(const Architecture& a, const RunConfig& run, const Grid& grid) {
  width = run.train.precision == Precision::bf16 ? 2 : 4;
  keys = run.train.micro_batch * run.train.sequence;
  gathered = keys / grid.size(Axis::context);
  own = gathered / grid.size(Axis::tensor);
  routed = own * a.top_k * grid.size(Axis::expert_tensor);
}

std::vector<Saved> saved_by_layer(const Architecture& a, const RunConfig& run, const Grid& grid, int64_t layer) {
  const Widths n(a, grid);
  const MicroBatch rows(a, run, grid);
  const int64_t w = rows.width, own = rows.own, all = rows.gathered;
  const bool gathers_keys = grid.size(Axis::context) > 1, packed = run.data.documents == Borders::packed;
  using enum Recompute;
  std::vector<Saved> saved = {
      // what, its bytes (rows x bytes of a row), until which recompute; behind it whose backward needs it
      {"layer input", own * (n.h * w + kFp32), full},                                           // rms_norm: x and 1 / rms
      {"its norm", all * n.h * w, none},                                                        // linear to q, k, v
      {"q, k, v", all * (n.q + 2 * n.kv) * w, selective},                                       // qk_norm_rope; v: attention
      {"rotated q and k", all * (n.q + (gathers_keys ? 0 : n.kv)) * w, none},                   // attention
      {"gathered k and v", gathers_keys ? rows.keys * 2 * n.kv * w : 0, none},                  // attention
      {"their segments' rows", gathers_keys && packed ? rows.keys * 2 * n.kv * w : 0, selective},  // attention on a GPU, by flash
      {"attention output", all * (n.q * w + n.heads * kFp32), selective},                       // attention, log-sum-exp; linear o
      {"attended", own * (n.h * w + kFp32), selective},                                         // add_rms_norm
  };
  if (!a.is_moe_layer(layer)) {
    saved.push_back({"its norm", all * n.h * w, none});                                         // linear to gate and up
    saved.push_back({"gate and up", all * 2 * n.f * w, selective});                             // swiglu
    saved.push_back({"their product", all * n.f * w, none});                                    // linear down
    return saved;
  }
  const bool shaken = run.balance.jitter != 0, at_home = experts_at_home(grid);
  const int64_t choices = own * a.top_k;
  saved.push_back({"its norm", shaken && !at_home ? 0 : own * n.h * w, none});                  // linear to the router's logits; the experts' rows
  saved.push_back({"shaken in fp32", shaken ? 2 * own * n.h * kFp32 : 0, selective});           // the same with jitter; its factors
  saved.push_back({"router's logits", own * (a.experts + 1) * kFp32, selective});               // the routing, log-sum-exp; a CPU: up to three
  saved.push_back({"routing", choices * (3 * kIndex + 2 * kFp32) + (at_home ? 0 : rows.routed * 2 * kIndex), full});
  saved.push_back({"experts' rows", at_home ? 0 : rows.routed * n.h * w, selective});            // grouped_matmul to gate and up; at home copied again
  saved.push_back({"experts' gate and up", rows.routed * 2 * n.fe * w, selective});             // swiglu
  saved.push_back({"rows' weights", rows.routed * kFp32, selective});                           // swiglu
  saved.push_back({"their product", rows.routed * n.fe * w, none});                             // grouped_matmul down
  return saved;
}

std::vector<Saved> saved_by_head(const Architecture& a, const RunConfig& run, const Grid& grid) {
  const Widths n(a, grid);
  const MicroBatch rows(a, run, grid);
  using enum Recompute;
  return {{"head input", rows.own * (n.h * rows.width + kFp32), full},                          // rms_norm
          {"its norm's gradient", rows.gathered * n.h * rows.width, full}};                     // vocabulary_loss: known in forward
}

int64_t saved_bytes(const std::vector<Saved>& all, Recompute recompute) {
  int64_t bytes = 0;
  for (const Saved& saved : all) bytes += recompute <= saved.until ? saved.bytes : 0;
  return bytes;
}

int64_t passing_in_layer(const Architecture& a, const RunConfig& run, const Grid& grid, int64_t layer) {
  const Widths n(a, grid);
  const MicroBatch rows(a, run, grid);
  const int64_t w = rows.width;
  // Weight gradients wait for an exchange, with what they multiply (Postponed).
  const bool waits = grid.size(Axis::tensor) > 1 || grid.size(Axis::context) > 1 || !experts_at_home(grid);
  // What stands before backward of this layer begins is still there; less what it has freed on the way.
  if (!a.is_moe_layer(layer)) {
    const int64_t weight_gradient = w < kFp32 ? 2 * n.f * n.h * kFp32 : 0;                      // linear's, fp32 before it is added
    const int64_t product = rows.gathered * n.f * w;
    return rows.own * n.h * w + (waits ? 3 : 2) * product + weight_gradient;                    // swiglu: d and the pair, less the product
  }
  const int64_t answers = rows.routed * n.h * w, product = rows.routed * n.fe * w;
  const int64_t weight_gradient = w < kFp32 ? n.local_experts * n.fe * n.h * w : 0;             // grouped_matmul's, bf16
  const int64_t copies = experts_at_home(grid) ? answers : 0;                                   // the experts' rows, once more
  return rows.own * n.h * w + copies + std::max({answers + product + weight_gradient,           // grouped_matmul down: d, the product's
                                                 3 * product,                                   // swiglu: d, the pair, a CPU's term; less the product
                                                 answers + 2 * weight_gradient - product,       // to gate and up: the pair, the rows'; less those
                                                 waits ? 3 * answers : 0});                     // the exchange: down's d, the rows' twice
}

int64_t passing_in_head(const Architecture& a, const RunConfig& run, const Grid& grid) {
  const Widths n(a, grid);
  const MicroBatch rows(a, run, grid);
  const int64_t norm = rows.gathered * n.h * rows.width, own_norm = grid.size(Axis::tensor) > 1 ? rows.own * n.h * rows.width : 0;
  const int64_t logits = rows_at_a_time(rows.gathered, n.V, rows.width, /*gpu=*/true) * n.V * rows.width;
  return norm + own_norm + logits;
}

int64_t passing_in_embedding(const Architecture& a, const RunConfig& run, const Grid& grid) {
  const Widths n(a, grid);
  const MicroBatch rows(a, run, grid);
  return rows.gathered * (n.h * rows.width + 4 * kIndex);   // the rows' gradients; on a GPU: ids and positions, sorted (a CPU makes a whole table)
}

}  // namespace upcycle
