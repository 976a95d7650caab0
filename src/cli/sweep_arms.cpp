#include "cli/sweep_arms.hpp"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.hpp"
#include "base/quantities.hpp"
#include "checkpoint/manifest.hpp"
#include "checkpoint/writer.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using nlohmann::ordered_json;

std::vector<std::string> overrides(const Settings& settings) {
  std::vector<std::string> out;
  for (const auto& [key, value] : settings) out.push_back(key + "=" + value);
  return out;
}

/// "moe.experts" of all keys that arms name -> "experts"; the whole key where two end alike.
std::map<std::string, std::string> short_names(const std::vector<Settings>& arms) {
  std::set<std::string> keys;
  for (const Settings& arm : arms) {
    for (const auto& [key, value] : arm) keys.insert(key);
  }
  std::map<std::string, int> ends;
  const auto end_of = [](const std::string& key) { return key.substr(key.find('.') + 1); };
  for (const std::string& key : keys) ++ends[end_of(key)];
  std::map<std::string, std::string> out;
  for (const std::string& key : keys) out[key] = ends[end_of(key)] == 1 ? end_of(key) : key;
  return out;
}

/// What a directory may be called on every file system.
std::string as_file_name(const std::string& words) {
  std::string out;
  for (const char c : words) {
    if (std::isalnum(static_cast<unsigned char>(c)) || c == '.' || c == '_' || c == '-' || c == '+') out += c;
    else if (c != '"') out += '-';
  }
  return out;
}

std::string name_of(const Settings& settings, const std::map<std::string, std::string>& names) {
  std::string out;
  for (const auto& [key, value] : settings) out += text(out.empty() ? "" : "_", names.at(key), "-", value);
  return as_file_name(out);
}

/// The dense model, trained on: no experts, and no ranks for them.
const Settings kControl = {{"moe.experts", "0"}, {"parallel.expert", "1"}, {"parallel.expert_tensor", "1"}};

void resolve(SweepArm& arm, const SweepFile& sweep) {
  arm.cannot.clear();
  try {
    arm.run = read_run(sweep.base, overrides(arm.settings));
    arm.plan = make_plan(*arm.run, static_cast<int>(sweep.ranks), std::nullopt);
    for (const std::string& problem : arm.plan->problems) arm.cannot += text(arm.cannot.empty() ? "" : "; ", problem);
  } catch (const UserError& error) {
    arm.cannot = error.what();
  }
}

void put(Settings& settings, const std::string& key, const std::string& value) {
  std::erase_if(settings, [&](const auto& setting) { return setting.first == key; });
  settings.emplace_back(key, value);
}

SweepArm arm_of(const SweepFile& sweep, const RunConfig& base, const Settings& own, const std::string& name, std::optional<int64_t> seed) {
  SweepArm arm{.name = name + (seed && sweep.seeds.size() > 1 ? text("_seed-", *seed) : ""), .settings = sweep.common};
  for (const auto& [key, value] : own) put(arm.settings, key, value);
  put(arm.settings, "run.directory", json((fs::path(sweep.directory) / arm.name).string()).dump());
  put(arm.settings, "run.name", json(arm.name).dump());
  if (seed) put(arm.settings, "run.seed", std::to_string(*seed));
  if (sweep.same_batches) put(arm.settings, "data.seed", std::to_string(base.data_seed()));
  resolve(arm, sweep);
  return arm;
}

void match_flops(std::vector<SweepArm>& arms, const SweepFile& sweep) {
  for (SweepArm& arm : arms) {
    if (!arm.plan) continue;
    // The reference of a seed: its control, else its first arm.
    const auto reference = std::find_if(arms.begin(), arms.end(), [&](const SweepArm& other) {
      return other.plan && other.run->run.seed == arm.run->run.seed && (other.control || !sweep.control);
    });
    if (reference == arms.end()) fail(sweep.path, ": sweep.match = \"flops\" needs a control that can run: ", arms.front().cannot);
    if (&*reference == &arm) continue;
    const double flops = reference->plan->flops_per_token * reference->tokens_per_step() * static_cast<double>(reference->steps());
    set_steps(arm, sweep, std::max<int64_t>(1, std::llround(flops / (arm.plan->flops_per_token * arm.tokens_per_step()))));
  }
}

}  // namespace

void set_steps(SweepArm& arm, const SweepFile& sweep, int64_t steps) {
  const RunConfig before = *arm.run;
  const double ratio = static_cast<double>(steps) / static_cast<double>(std::max<int64_t>(1, before.train.steps));
  const auto scaled = [&](int64_t part) { return std::to_string(std::min(steps, int64_t{std::llround(ratio * static_cast<double>(part))})); };
  put(arm.settings, "train.steps", std::to_string(steps));
  if (before.optimizer.warmup > 0) put(arm.settings, "optimizer.warmup", scaled(before.optimizer.warmup));
  if (before.optimizer.decay > 0) put(arm.settings, "optimizer.decay", scaled(before.optimizer.decay));
  resolve(arm, sweep);
}

std::vector<SweepArm> make_arms(const SweepFile& sweep) {
  const RunConfig base = read_run(sweep.base, overrides(sweep.common));
  if (sweep.match != Match::tokens) {
    for (const Settings& arm : sweep.arms) {
      for (const char* key : {"train.steps", "optimizer.warmup", "optimizer.decay"}) {
        if (std::any_of(arm.begin(), arm.end(), [&](const auto& setting) { return setting.first == key; })) {
          fail(sweep.path, ": sweep.match chooses the steps of every arm, but [[arms]] names ", key, ": leave it out, or match \"tokens\"");
        }
      }
    }
  }
  const std::map<std::string, std::string> names = short_names(sweep.arms);
  std::vector<std::optional<int64_t>> seeds(sweep.seeds.begin(), sweep.seeds.end());
  if (seeds.empty()) seeds = {std::nullopt};
  std::vector<SweepArm> arms;
  if (sweep.control) {
    for (const auto& seed : seeds) {
      arms.push_back(arm_of(sweep, base, kControl, "dense", seed));
      arms.back().control = true;
    }
  }
  for (const Settings& own : sweep.arms) {
    for (const auto& seed : seeds) arms.push_back(arm_of(sweep, base, own, name_of(own, names), seed));
  }
  if (sweep.match == Match::flops) match_flops(arms, sweep);
  return arms;
}

ArmProgress progress_of(const fs::path& run_directory) {
  ArmProgress progress;
  if (const auto newest = newest_checkpoint(run_directory)) progress.saved = *step_of(newest->filename().string());
  std::ifstream metrics(run_directory / "metrics.jsonl");
  std::vector<double> rates;
  for (std::string line; std::getline(metrics, line);) {
    const json entry = json::parse(line, nullptr, /*allow_exceptions=*/false);   // the last line may be half written
    if (!entry.is_object()) continue;
    if (entry.value("kind", "") == "validation") progress.validation = entry.value("loss", NAN);
    if (entry.value("kind", "") == "step") rates.push_back(entry.value("tokens_per_second", 0.0));
  }
  if (!rates.empty()) {
    std::nth_element(rates.begin(), rates.begin() + static_cast<int64_t>(rates.size() / 2), rates.end());
    progress.tokens_per_second = rates[rates.size() / 2];
  }
  return progress;
}

std::string sweep_table(const std::vector<SweepArm>& arms, double teraflops) {
  size_t width = 4;
  for (const SweepArm& arm : arms) width = std::max(width, arm.name.size());
  std::string out;
  char line[512];
  std::snprintf(line, sizeof line, "%3s  %-*s %10s %10s %8s %10s %11s %8s\n", "", static_cast<int>(width), "arm", "parameters", "active", "steps",
                "tokens", "FLOPs", "hours");
  out += line;
  for (size_t i = 0; i < arms.size(); ++i) {
    const SweepArm& arm = arms[i];
    if (!arm.cannot.empty()) {
      std::snprintf(line, sizeof line, "%3zu  %-*s ", i, static_cast<int>(width), arm.name.c_str());
      out += text(line, "can't run: ", arm.cannot, "\n");
      continue;
    }
    const double tokens = arm.tokens_per_step() * static_cast<double>(arm.steps()), flops = tokens * arm.plan->flops_per_token;
    char hours[32] = "-";
    if (teraflops > 0) std::snprintf(hours, sizeof hours, "%.3g", flops / (teraflops * 1e12 * 3600));
    std::snprintf(line, sizeof line, "%3zu  %-*s %10s %10s %8lld %10s %11s %8s\n", i, static_cast<int>(width), arm.name.c_str(),
                  parameter_count(arm.plan->parameters.total).c_str(),
                  parameter_count(arm.plan->parameters.active).c_str(), static_cast<long long>(arm.steps()),
                  with_prefix(tokens).c_str(), with_prefix(flops).c_str(), hours);
    out += line;
  }
  return out;
}

ordered_json sweep_json(const SweepFile& sweep, const std::vector<SweepArm>& arms) {
  constexpr const char* kMatch[] = {"tokens", "flops", "time"};
  ordered_json out = {{"sweep", sweep.path}, {"base", sweep.base}, {"match", kMatch[static_cast<int>(sweep.match)]}, {"ranks", sweep.ranks},
                      {"arms", ordered_json::array()}};
  for (size_t i = 0; i < arms.size(); ++i) {
    const SweepArm& arm = arms[i];
    ordered_json one = {{"index", i}, {"name", arm.name}, {"control", arm.control}, {"settings", ordered_json::object()}};
    for (const auto& [key, value] : arm.settings) one["settings"][key] = json::parse(value);
    if (arm.run) one["seed"] = arm.run->run.seed, one["directory"] = arm.run->run.directory, one["steps"] = arm.steps();
    if (arm.plan) {
      one["parameters"] = arm.plan->parameters.total, one["active_parameters"] = arm.plan->parameters.active;
      one["flops_per_token"] = arm.plan->flops_per_token, one["tokens_per_step"] = arm.tokens_per_step();
      if (!arm.plan->memory.empty()) one["memory_per_rank"] = largest(arm.plan->memory).total();
    }
    if (!arm.cannot.empty()) one["cannot"] = arm.cannot;
    out["arms"].push_back(std::move(one));
  }
  return out;
}

}  // namespace upcycle
