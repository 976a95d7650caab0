#include <array>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "cli/plan.hpp"

namespace upcycle {
namespace {

using nlohmann::ordered_json;

/// 89650000000 -> "89.65 G": four digits and a decimal prefix.
std::string with_prefix(double number) {
  constexpr std::array<const char*, 7> kPrefixes = {"", "k", "M", "G", "T", "P", "E"};
  size_t power = 0;
  while (number >= 999.95 && power + 1 < kPrefixes.size()) number /= 1000, ++power;
  char out[32];
  const int decimals = power == 0 ? 0 : number < 9.9995 ? 3 : number < 99.995 ? 2 : 1;
  std::snprintf(out, sizeof out, "%.*f %s", decimals, number, kPrefixes[power]);
  return out;
}

std::string bytes(int64_t number) { return with_prefix(static_cast<double>(number)) + "B"; }

/// Parameters as the field writes them: "89.65 B", "5.38 M".
std::string parameter_count(int64_t number) {
  char out[32];
  const bool small = number < 1000000000;
  std::snprintf(out, sizeof out, "%.2f %s", static_cast<double>(number) / (small ? 1e6 : 1e9), small ? "M" : "B");
  return out;
}

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
  if (!plan.target.recipe) {
    return plan.has_weights ? "the source as it is" : "random initialisation (no source.model)";
  }
  const Recipe& recipe = *plan.target.recipe;
  return text(exactness(plan), recipe.lossless() ? ", lossless" : "", ": ", recipe.copies, " copies x ",
              recipe.granularity, " shards; gate x ", recipe.gate_factor, ", up x ", recipe.up_factor, ", down x ",
              recipe.down_factor);
}

std::string describe_grid(const Plan& plan) {
  if (!plan.grid) return text(plan.ranks, ", which [parallel] does not fit");
  const Grid& grid = *plan.grid;
  const auto size = [&](Axis axis) { return text(name(axis), " ", grid.size(axis)); };
  return text(plan.ranks, " = ", size(Axis::tensor), " x ", size(Axis::context), " x ", size(Axis::data), " x ",
              size(Axis::pipeline), "; experts: ", size(Axis::expert_tensor), " x ", size(Axis::expert), " x ",
              size(Axis::expert_data));
}

std::string memory_table(const Plan& plan) {
  std::string out = "\nMemory of a rank, the largest of each stage\n";
  char line[200];
  std::snprintf(line, sizeof line, "  %5s %10s %10s %10s %10s %10s %12s %10s\n", "stage", "parameters", "weights",
                "masters", "gradients", "moments", "activations*", "total");
  out += line;
  for (const RankMemory& m : plan.memory) {
    std::snprintf(line, sizeof line, "  %5d %10s %10s %10s %10s %10s %12s %10s\n", m.stage,
                  with_prefix(static_cast<double>(m.parameters)).c_str(), bytes(m.weights).c_str(),
                  bytes(m.masters).c_str(), bytes(m.gradients).c_str(), bytes(m.moments).c_str(),
                  bytes(m.activations).c_str(), bytes(m.total()).c_str());
    out += line;
  }
  return out +
         "  * an estimate: what backward keeps, experts in balance; libraries' own memory and temporaries come on "
         "top\n";
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
                         "  ranks        ", describe_grid(plan), "\n");
  if (!plan.memory.empty()) out += memory_table(plan);
  out += list("What does not divide", plan.problems);
  out += list("What train can't do yet", plan.not_built);
  return out + "\nThe resolved run\n\n" + to_toml(plan.run);
}

ordered_json to_json(const Plan& plan) {
  const RankMemory* largest = nullptr;
  ordered_json memory = ordered_json::array();
  for (const RankMemory& m : plan.memory) {
    memory.push_back({{"stage", m.stage},
                      {"rank", m.rank},
                      {"parameters", m.parameters},
                      {"weights", m.weights},
                      {"masters", m.masters},
                      {"gradients", m.gradients},
                      {"moments", m.moments},
                      {"activations_estimate", m.activations},
                      {"total", m.total()}});
    if (!largest || m.total() > largest->total()) largest = &m;
  }
  ordered_json grid;
  if (plan.grid) {
    for (const Axis axis : {Axis::tensor, Axis::context, Axis::data, Axis::pipeline, Axis::expert_tensor, Axis::expert,
                            Axis::expert_data}) {
      grid[name(axis)] = plan.grid->size(axis);
    }
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
          {"checkpoint_bytes", {{"step_zero", plan.checkpoint.step_zero}, {"full", plan.checkpoint.full}}},
          {"ranks", plan.ranks},
          {"grid", grid},
          {"bytes_per_rank", memory},
          {"largest_rank_bytes", largest ? ordered_json(largest->total()) : ordered_json()},
          {"problems", plan.problems},
          {"not_built", plan.not_built},
          {"run", ordered_json::parse(to_json(plan.run))},
          {"origins", plan.run.origins}};
}

}  // namespace upcycle
