#include <array>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/quantities.hpp"
#include "cli/plan.hpp"

namespace upcycle {
namespace {

using nlohmann::ordered_json;

constexpr std::array<const char*, 3> kRecompute = {"none", "selective", "full"};

std::string bytes(int64_t number) { return with_prefix(static_cast<double>(number)) + "B"; }

std::string describe_model(const Architecture& a) {
  std::string out =
      text(a.is_moe() ? "Qwen3-MoE" : "Qwen3", ", ", a.layers, " layers of width ", a.hidden, ", ", a.heads,
           " heads of ", a.head_dim, " (", a.kv_heads, " for keys and values), vocabulary ", a.vocab);
  if (a.is_moe()) {
    out += text("; ", a.experts, " experts of width ", a.expert_ffn, ", ", a.top_k, " a token");
    if (a.num_moe_layers() < a.layers) out += text(", in ", a.num_moe_layers(), " of the layers");
  }
  return out;
}

/// What the step from the source to step 0 keeps.
std::string exactness(const Plan& plan) {
  if (plan.target.recipe) return name(plan.target.recipe->exactness());
  return plan.has_weights ? "unchanged" : "random";
}

std::string describe_start(const Plan& plan) {
  const char* const moments[] = {"", "; moments copied", "; moments copied, scaled"};
  const char* const carried = moments[static_cast<size_t>(plan.run.upcycle.optimizer)];
  if (!plan.target.recipe) {
    return plan.has_weights ? text("the source as it is", carried) : "random initialisation (no source.model)";
  }
  const Recipe& recipe = *plan.target.recipe;
  const std::string sources = recipe.quotas.empty() ? "" : text(" of ", recipe.quotas.size(), " sources", recipe.sources_alike ? "" : " (exact if they are the same bytes)");
  const char* const orders[] = {"", ", hidden units in a random order for each copy", ", hidden units in clusters"};
  return text(exactness(plan), recipe.lossless() ? ", lossless" : "", ": ", recipe.copies, " copies x ",
              recipe.of_mixture() ? text(recipe.source.experts, " experts") : text(recipe.granularity, " shards"), sources, orders[static_cast<size_t>(recipe.permutation)], "; gate x ", recipe.gate_factor, ", up x ", recipe.up_factor, ", down x ",
              recipe.down_factor, carried);
}

std::string describe_grid(const Plan& plan) {
  if (!plan.grid) return text(plan.ranks, ", which [parallel] does not fit");
  const Grid& grid = *plan.grid;
  const auto size = [&](Axis axis) { return text(name(axis), " ", grid.size(axis)); };
  return text(plan.ranks, " = ", size(Axis::tensor), " x ", size(Axis::context), " x ", size(Axis::data), " x ",
              size(Axis::pipeline), "; experts: ", size(Axis::expert_tensor), " x ", size(Axis::expert), " x ",
              size(Axis::expert_data));
}

template <class... Values>
std::string line(const char* pattern, Values... values) {
  char out[240];
  std::snprintf(out, sizeof out, pattern, values...);
  return out;
}

std::string memory_table(const Plan& plan) {
  std::string out = "\nMemory of a rank, the largest of each stage\n";
  out += line("  %5s %10s %9s %9s %9s %9s %9s %11s %9s %9s %9s\n", "stage", "parameters", "weights", "masters", "gradients", "moments",
              "in flight", "activations", "buffers", "libraries", "total");
  for (const RankMemory& m : plan.memory) {
    out += line("  %5d %10s %9s %9s %9s %9s %9.4g %11s %9s %9s %9s\n", m.stage, with_prefix(static_cast<double>(m.parameters)).c_str(),
                bytes(m.weights).c_str(), bytes(m.masters).c_str(), bytes(m.gradients).c_str(), bytes(m.moments).c_str(), m.in_flight,
                bytes(m.activations).c_str(), bytes(m.buffers).c_str(), bytes(m.libraries).c_str(), bytes(m.total()).c_str());
  }
  out += text("  in flight: micro-batches whose activations a stage keeps at once, of the ", plan.micro_batches,
              " it computes in a step; activations: what backward keeps of\n  them, experts in balance; buffers: the most on top of it at any "
              "moment (logits, a layer computed anew, temporaries, messages);\n  libraries: an allowance for CUDA, cuBLAS, NCCL and gaps between tensors\n");
  out += line("\nLargest rank%s\n", plan.gpu_memory_given ? "" : ", if a GPU has 80 GB (--gpu-memory says what it has)");
  out += line("  %-20s %9s %9s %11s %9s\n", "train.recompute", "total", "of", "activations", "");
  for (size_t mode = 0; mode < plan.by_recompute.size(); ++mode) {
    const RankMemory& m = plan.by_recompute[mode];
    const bool chosen = static_cast<size_t>(plan.run.train.recompute) == mode;
    out += line("  %-20s %9s %9s %11s   %s\n", (std::string(kRecompute[mode]) + (chosen ? " (this run)" : "")).c_str(),
                bytes(m.total()).c_str(), bytes(plan.gpu_memory).c_str(), bytes(m.activations).c_str(),
                m.total() <= plan.gpu_memory ? "fits" : "does not fit");
  }
  return out;
}

/// "0 8 16 24", "0 1 2 .. 63".
std::string ranks_of_group(const Grid& grid, Axis axis) {
  const std::vector<int> ranks = grid.peers(axis, 0);
  std::string out;
  for (size_t i = 0; i < ranks.size(); ++i) {
    if (ranks.size() > 5 && i == 3) out += " ..", i = ranks.size() - 1;
    out += (out.empty() ? "" : " ") + std::to_string(ranks[i]);
  }
  return out;
}

std::string traffic_table(const Plan& plan) {
  if (plan.traffic.empty()) return "";
  std::string out = "\nWhat a rank sends in a step, the most of any stage\n";
  out += line("  %-13s %5s  %-18s %9s %9s  %s\n", "axis", "ranks", "rank 0's group", "forward", "backward", "what");
  for (const Traffic& t : plan.traffic) {
    out += line("  %-13s %5d  %-18s %9s %9s  %s\n", name(t.axis), plan.grid->size(t.axis), ranks_of_group(*plan.grid, t.axis).c_str(),
                bytes(t.forward).c_str(), bytes(t.backward).c_str(), t.what);
  }
  if (plan.grid->size(Axis::pipeline) > 1) {
    out += line("  pipeline bubble: (%d - 1) / (%ld x %ld) = %.1f %% of the computing time\n", plan.grid->size(Axis::pipeline),
                static_cast<long>(plan.run.parallel.virtual_stages), static_cast<long>(plan.micro_batches), 100 * plan.bubble);
  }
  return out;
}

/// "2.4 passes over the 2500 samples of PREFIX", a line for each data set that has an end.
std::string describe_data(const Plan& plan) {
  std::string out;
  for (const Passes& data : plan.passes) {
    if (data.samples == 0) continue;
    out += text(out.empty() ? "  data         " : "               ", line("%.4g", data.passes()), " passes over the ", data.samples,
                " samples of ", data.prefix, data.masked ? ", learned where its loss mask says so\n" : "\n");
  }
  return out;
}

std::string list(const std::string& title, const std::vector<std::string>& lines) {
  std::string out = "\n" + title + "\n";
  if (lines.empty()) out += "  nothing\n";
  for (const std::string& line : lines) out += "  " + line + "\n";
  return out;
}

}  // namespace

std::string to_text(const Plan& plan) {
  const auto tokens = static_cast<double>(plan.run.train.global_batch * plan.run.train.sequence);
  std::string out = text(plan.run.run.name, ": ", describe_model(plan.target.architecture), "\n", "  parameters   ",
                         parameter_count(plan.parameters.total), " total, ", parameter_count(plan.parameters.active), " active\n",
                         "  source       ", plan.source, "\n", "  step 0       ", describe_start(plan), "\n",
                         "  compute      ", with_prefix(plan.flops_per_token), "FLOP per token, ",
                         with_prefix(plan.flops_per_token * tokens), "FLOP per step of ", with_prefix(tokens),
                         "tokens\n", "  checkpoints  ", bytes(static_cast<int64_t>(plan.checkpoint.step_zero)),
                         " step 0, ", bytes(static_cast<int64_t>(plan.checkpoint.full)), " each later one\n",
                         describe_data(plan), "  ranks        ", describe_grid(plan), "\n");
  if (!plan.memory.empty()) out += memory_table(plan) + traffic_table(plan);
  out += list("What stands in the way", plan.problems);
  return out + "\nThe resolved run\n\n" + to_toml(plan.run);
}

ordered_json to_json(const Plan& plan) {
  ordered_json memory = ordered_json::array();
  for (const RankMemory& m : plan.memory) {
    memory.push_back({{"stage", m.stage},
                      {"rank", m.rank},
                      {"parameters", m.parameters},
                      {"weights", m.weights},
                      {"masters", m.masters},
                      {"gradients", m.gradients},
                      {"moments", m.moments},
                      {"micro_batches_in_flight", m.in_flight},
                      {"activations", m.activations},
                      {"buffers", m.buffers},
                      {"libraries", m.libraries},
                      {"total", m.total()}});
  }
  ordered_json by_recompute;
  for (size_t mode = 0; mode < plan.by_recompute.size(); ++mode) {
    const int64_t total = plan.by_recompute[mode].total();
    by_recompute[kRecompute[mode]] = {{"largest_rank_bytes", total}, {"fits", total <= plan.gpu_memory}};
  }
  ordered_json traffic = ordered_json::array();
  for (const Traffic& t : plan.traffic) {
    traffic.push_back({{"axis", name(t.axis)},
                       {"ranks", plan.grid->size(t.axis)},
                       {"what", t.what},
                       {"forward", t.forward},
                       {"backward", t.backward}});
  }
  ordered_json grid;
  if (plan.grid) {
    for (const Axis axis : {Axis::tensor, Axis::context, Axis::data, Axis::pipeline, Axis::expert_tensor, Axis::expert,
                            Axis::expert_data}) {
      grid[name(axis)] = plan.grid->size(axis);
    }
  }
  ordered_json data = ordered_json::array();
  for (const Passes& part : plan.passes) {
    data.push_back({{"prefix", part.prefix}, {"samples", part.samples}, {"drawn", part.drawn}, {"passes", part.passes()}, {"masked", part.masked}});
  }
  ordered_json recipe;
  if (plan.target.recipe) recipe = to_json(*plan.target.recipe);
  return {{"name", plan.run.run.name},
          {"parameters", {{"total", plan.parameters.total}, {"active", plan.parameters.active}}},
          {"architecture", to_hf(plan.target.architecture, {})},
          {"source", plan.source},
          {"exactness", exactness(plan)},
          {"recipe", recipe},
          {"flops_per_token", plan.flops_per_token},
          {"tokens_per_step", plan.run.train.global_batch * plan.run.train.sequence},
          {"data", data},
          {"checkpoint_bytes", {{"step_zero", plan.checkpoint.step_zero}, {"full", plan.checkpoint.full}}},
          {"ranks", plan.ranks},
          {"grid", grid},
          {"bytes_per_rank", memory},
          {"largest_rank_bytes", plan.memory.empty() ? ordered_json() : ordered_json(largest(plan.memory).total())},
          {"gpu_memory", plan.gpu_memory},
          {"by_recompute", by_recompute},
          {"micro_batches_per_rank", plan.micro_batches},
          {"pipeline_bubble", plan.bubble},
          {"bytes_sent_per_step", traffic},
          {"problems", plan.problems},
          {"run", ordered_json::parse(to_json(plan.run))},
          {"origins", plan.run.origins}};
}

}  // namespace upcycle
