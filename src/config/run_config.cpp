#include "config/run_config.hpp"

#include "base/error.hpp"
#include "base/nearest.hpp"
#include "config/fields.hpp"
#include "config/run_checks.hpp"

namespace upcycle {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

/// The keys that are written: those of [moe] only when the run has such a section, since its absence says something.
std::vector<Field> written_fields(RunConfig& config) {
  std::vector<Field> fields = describe(config);
  if (!config.moe_given) std::erase_if(fields, [](const Field& field) { return field.section() == "moe"; });
  return fields;
}

/// JSON's scalars and lists are TOML, but for DEL, which TOML wants escaped.
std::string toml_value(const json& value) {
  std::string out;
  for (const char c : value.dump()) {
    if (c == '\x7f') {
      out += "\\u007f";
    } else {
      out += c;
    }
  }
  return out;
}

}  // namespace

double RunConfig::timeout_seconds() const { return seconds_from(run.timeout); }

std::vector<Problem> check_together(const RunConfig& c) {
  std::vector<Problem> problems;
  const auto add = [&](const std::string& key, const auto&... parts) {
    problems.push_back({key, text(key, parts...)});
  };
  if (!c.source.model.empty() && !c.source.models.empty()) {
    add("source.models", ": give source.model, one directory, or source.models, several, not both");
  }
  if (!c.source.quotas.empty() && c.source.quotas.size() != c.source.models.size()) {
    add("source.quotas", text(": ", c.source.quotas.size(), " quotas for ", c.source.models.size(), " source.models: give one for each, or none"));
  }
  if (c.source.all().empty() && c.source.architecture.empty()) {
    add("source.model", ": give source.model (a directory with weights), source.architecture (a config.json), or both");
  }
  if (c.train.global_batch % c.train.micro_batch != 0) {
    add("train.micro_batch", " = ", c.train.micro_batch,
        " does not divide train.global_batch = ", c.train.global_batch, ": ",
        nearest_divisors(c.train.micro_batch, c.train.global_batch), " would");
  }
  if (c.optimizer.min_lr > c.optimizer.lr) {
    add("optimizer.min_lr", " = ", c.optimizer.min_lr, " is more than optimizer.lr = ", c.optimizer.lr);
  }
  if (c.optimizer.schedule == Schedule::wsd) {
    if (c.optimizer.decay < 1)
      add("optimizer.decay", " = ", c.optimizer.decay, ": schedule \"wsd\" needs at least 1 step of descent");
  } else if (c.optimizer.decay != 0) {
    add("optimizer.decay", " = ", c.optimizer.decay, ": only schedule \"wsd\" has a descent of its own");
  }
  if (c.optimizer.warmup > c.train.steps) {
    add("optimizer.warmup", " = ", c.optimizer.warmup, " is more than train.steps = ", c.train.steps);
  } else if (c.optimizer.decay > c.train.steps - c.optimizer.warmup) {
    add("optimizer.decay", " = ", c.optimizer.decay, " is more than the ", c.train.steps - c.optimizer.warmup,
        " steps that train.steps and optimizer.warmup leave");
  }
  if (c.data.split == std::array<int64_t, 3>{0, 0, 0})
    add("data.split", " = [0, 0, 0]: at least one share must be positive");
  if (c.moe_given && c.moe.experts > 0 && c.moe.top_k > c.moe.experts) {
    add("moe.top_k", " = ", c.moe.top_k, " is more than moe.experts = ", c.moe.experts);
  }
  if (c.balance.pad_to_capacity && c.balance.capacity_factor == 0) {
    add("balance.pad_to_capacity", " = true needs balance.capacity_factor > 0");
  }
  if (c.checkpoint.asynchronous && c.checkpoint.transfer == "independent") {
    add("checkpoint.transfer", " = \"independent\" writes through HDF5, which works on one thread at a time: it needs checkpoint.asynchronous = false");
  }
  if (c.checkpoint.keep_best && c.validate.every == 0) {
    add("checkpoint.keep_best", " = true needs validate.every > 0: the best checkpoint is that of the lowest validation loss");
  } else if (c.checkpoint.keep_best && c.checkpoint.every % c.validate.every != 0) {
    add("checkpoint.keep_best", " = true needs a validation with every checkpoint: checkpoint.every = ", c.checkpoint.every,
        " is not a multiple of validate.every = ", c.validate.every);
  }
  if (c.parallel.virtual_stages > 1 && c.parallel.pipeline == 1) {
    add("parallel.virtual_stages", " = ", c.parallel.virtual_stages, " needs parallel.pipeline > 1");
  }
  const int64_t chunks = c.parallel.pipeline * c.parallel.virtual_stages;
  if (const auto given = static_cast<int64_t>(c.parallel.layout.size()); given > 0 && given != chunks) {
    add("parallel.layout", " names ", given, " chunks, but pipeline ", c.parallel.pipeline, " x virtual_stages ",
        c.parallel.virtual_stages, " makes ", chunks);
  }
  if (!c.parallel.layout.empty() && (c.parallel.count_embedding || c.parallel.count_loss)) {
    add("parallel.layout", " says where every layer goes: leave out count_embedding and count_loss");
  }
  return problems;
}

std::string to_toml(const RunConfig& original) {
  RunConfig config = original;
  std::string out, section;
  for (const Field& field : written_fields(config)) {
    if (field.section() != section) {
      out += (section.empty() ? "[" : "\n[") + field.section() + "]\n";
      section = field.section();
    }
    const auto origin = config.origins.find(field.key);
    std::string line = field.name() + " = " + toml_value(field.write());
    line.resize(std::max<size_t>(line.size(), 40), ' ');
    out += line + "  # " + (origin == config.origins.end() ? "default" : origin->second) + "\n";
  }
  return out;
}

std::string to_json(const RunConfig& original) {
  RunConfig config = original;
  ordered_json out = ordered_json::object();
  for (const Field& field : written_fields(config)) out[field.section()][field.name()] = field.write();
  return out.dump(2);
}

RunConfig run_from_json(const std::string& text_of_run, const std::string& where) {
  const json run = json::parse(text_of_run, nullptr, /*allow_exceptions=*/false);
  if (!run.is_object()) fail(where, ": 'run' is not an object: the manifest is damaged");
  RunConfig config;
  for (const Field& field : describe(config)) {
    const auto section = run.find(field.section());
    if (section == run.end() || !section->is_object() || !section->contains(field.name())) continue;
    const json& value = section->at(field.name());
    if (const std::string problem = field.read(value); !problem.empty()) fail(where, ": run.", field.key, ": ", problem, ": the manifest is damaged");
  }
  config.moe_given = run.contains("moe");
  return config;
}

}  // namespace upcycle
