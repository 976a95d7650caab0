#include "train/setup.hpp"

#include <nlohmann/json.hpp>
#include <random>

#include "base/error.hpp"
#include "base/log.hpp"
#include "base/text_file.hpp"
#include "checkpoint/durable.hpp"
#include "train/layout_check.hpp"
#include "train/passes.hpp"
#include "train/resume.hpp"
#include "train/run_directory.hpp"
#include "train/several_sources.hpp"

namespace upcycle {
namespace {

Architecture source_architecture(const RunConfig& config, const std::optional<WeightSource>& source) {
  if (config.source.architecture.empty()) return source->architecture();
  const Architecture given = read_architecture(config.source.architecture);
  if (!source) return given;
  const std::vector<std::string> different = differences(given, source->architecture());
  if (!different.empty()) {
    fail("source.architecture = ", config.source.architecture, " and source.model = ", config.source.model,
         " are different models: ", different.front(), ". Correct one, or leave source.architecture out");
  }
  return source->architecture();
}

// `checks`: one rank reads the tokens for all.
void open_data(const RunConfig& config, Setup& setup, bool checks) {
  const int64_t vocab = setup.target.architecture.vocab, sequence = config.train.sequence;
  const auto seed = static_cast<uint64_t>(config.data_seed());
  if (config.data.train.empty()) fail("data.train is missing: name the data, or say data.train = \"mock\"");
  const Borders borders = config.data.documents;
  setup.train.emplace(config.data.train, config.data.split, Split::train, sequence, vocab, seed, borders);
  if (const std::string problem = too_many_passes(config, *setup.train); !problem.empty()) fail(problem);
  if (checks) setup.train->check(vocab);
  if (config.validate.every == 0) return;
  setup.validation.emplace(open_validation(config, vocab));
  if (checks) setup.validation->check(vocab);
}

std::string new_run_id(const std::string& name) {
  std::random_device entropy;
  char digits[20];
  std::snprintf(digits, sizeof digits, "%08x%08x", entropy(), entropy());
  return name + "-" + digits;
}

// What the routers of a mixture remember (biases, counts), for each copy of an expert what it was for the expert.
nlohmann::json copied(const nlohmann::json& routers, int64_t copies) {
  nlohmann::json out = routers;
  for (auto& [layer, router] : out.items()) {
    for (auto& [what, of_expert] : router.items()) {
      nlohmann::json all = nlohmann::json::array();
      for (const nlohmann::json& value : of_expert) all.insert(all.end(), static_cast<size_t>(copies), value);
      of_expert = std::move(all);
    }
  }
  return out;
}

// Opens and checks what source.models names beside the first.
void open_further(const RunConfig& config, Setup& setup) {
  if (config.source.models.size() < 2) return;
  if (config.moe.experts == 0) {
    fail("source.models names ", config.source.models.size(), " models, which become experts of one: say how many in moe.experts, or name one model");
  }
  setup.further.reserve(config.source.models.size() - 1);
  for (size_t i = 1; i < config.source.models.size(); ++i) {
    const WeightSource& next = setup.further.emplace_back(config.source.models[i]);
    check_same_kind(*setup.source, next);
    next.check();
  }
}

// Moments that are to be carried over must be there.
void refuse_missing_moments(const RunConfig& config, const std::optional<WeightSource>& source) {
  if (config.upcycle.optimizer == Moments::reset) return;
  if (config.source.models.size() > 1) fail("upcycle.optimizer: the moments of several source.models belong to different weights; leave the key out (\"reset\")");
  const std::string asked = text("upcycle.optimizer = \"", config.upcycle.optimizer == Moments::copy ? "copy" : "scaled", "\"");
  if (!source) fail(asked, " carries the moments of a trained model over: name one in source.model, a checkpoint of this program");
  if (source->has_moments()) return;
  fail(asked, ": ", source->folder().string(), source->is_checkpoint()
           ? " is a checkpoint without moments, as convert and a run's step 0 write them: name a later step"
           : " is a Hugging Face directory, which has no optimizer state: name a checkpoint that this program trained",
       ", or leave the key out (\"reset\")");
}

// A mixture that is taken as it is came out of a dense model the way it did.
void keep_recipe(const WeightSource& source, RunRecord& record) {
  const Manifest manifest = read_manifest(source.folder());
  if (!manifest.provenance.is_object() || !manifest.provenance.contains("recipe")) return;
  record.provenance["recipe"] = manifest.provenance["recipe"];
  if (manifest.files.contains(kClustersFile)) record.texts[kClustersFile] = text_of(source.folder() / kClustersFile);
}

nlohmann::json provenance_of_source(const Setup& setup) {
  if (!setup.source) return "random";
  const nlohmann::json first = setup.source->provenance();
  if (setup.further.empty()) return first;
  nlohmann::json models = nlohmann::json::array({first});
  for (const WeightSource& source : setup.further) models.push_back(source.provenance());
  std::string paths;
  for (const nlohmann::json& model : models) paths += (paths.empty() ? "" : ", ") + model["path"].get<std::string>();
  return {{"kind", "several"}, {"path", paths}, {"files", nlohmann::json::object()}, {"models", models}};
}

// An older checkpoint of the source than its user may think of is not taken without a word.
void tell_of_damaged_sources(const RunConfig& config) {
  for (const std::string& model : config.source.all()) {
    std::vector<std::string> refused;
    newest_checkpoint(model, &refused);
    for (const std::string& line : refused) log::warning(line + ": an older checkpoint is the source");
  }
}

}  // namespace

void make_record(const RunConfig& config, Setup& setup) {
  RunRecord& record = setup.record;
  record.run = nlohmann::json::parse(to_json(config));
  if (setup.resume) {
    const Manifest& manifest = setup.resume->manifest();
    record.run_id = manifest.run_id;
    record.architecture = manifest.architecture;
    record.provenance = manifest.provenance;
    record.texts = texts_of(*setup.resume);
    if (!config.source.tokenizer.empty() && std::filesystem::exists(config.source.tokenizer)) {   // the same, or accepted
      for (auto& [name, content] : carried_tokenizer(tokenizer_files(config.source.tokenizer))) record.texts[name] = std::move(content);
    }
    return;
  }
  record.run_id = new_run_id(config.run.name);
  record.provenance = {{"program", "upcycle"}, {"source", provenance_of_source(setup)}};
  if (config.upcycle.optimizer != Moments::reset) record.provenance["optimizer"] = record.run["upcycle"]["optimizer"];
  if (setup.target.recipe) {
    record.provenance["recipe"] = to_json(*setup.target.recipe);
  } else if (setup.source && setup.source->is_checkpoint()) {
    keep_recipe(*setup.source, record);
  }
  const nlohmann::json extra = setup.source ? setup.source->config()
                                            : nlohmann::json::parse(text_of(config.source.architecture));
  record.architecture = to_hf(setup.target.architecture, extra);
  record.texts["config.json"] = record.architecture.dump(2) + "\n";
  std::vector<std::filesystem::path> files;
  if (!config.source.tokenizer.empty()) {
    files = tokenizer_files(config.source.tokenizer);
  } else if (setup.source) {
    files = setup.source->tokenizer_files();
  }
  record.texts.merge(carried_tokenizer(files));
}

Sampler open_validation(const RunConfig& config, int64_t vocab) {
  constexpr uint64_t kSeed = 1234;   // nobody's: losses of runs that differ in their seeds are to be compared
  const bool own = !config.data.validation.empty();
  return {own ? config.data.validation : config.data.train, own ? std::array<int64_t, 3>{0, 1, 0} : config.data.split, Split::validation,
          config.train.sequence, vocab, kSeed, config.data.documents};
}

at::ScalarType compute_dtype(Precision precision) { return precision == Precision::bf16 ? at::kBFloat16 : at::kFloat; }

ReadDense reader_of(const Setup& setup) {
  std::vector<ReadDense::One> each;
  const auto add = [&](const WeightSource& source) { each.emplace_back([&source](const std::string& name, const Box& box) { return source.read(name, box); }); };
  if (setup.source) add(*setup.source);
  for (const WeightSource& source : setup.further) add(source);
  return ReadDense(std::move(each));
}

void open_sources(const RunConfig& config, Setup& setup, bool speaks) {
  if (const auto models = config.source.all(); !models.empty()) {
    if (speaks) tell_of_damaged_sources(config);
    setup.source.emplace(models.front());
    setup.source->check();
    open_further(config, setup);
    if (setup.source->is_checkpoint()) setup.routers = read_manifest(setup.source->folder()).training.value("routers", nlohmann::json());
  }
  refuse_missing_moments(config, setup.source);
  Architecture source = source_architecture(config, setup.source);
  for (const WeightSource& other : setup.further) {
    if (other.architecture().dtype == at::kFloat) source.dtype = at::kFloat;   // nothing of it is lost
  }
  setup.target = choose_target(config, source, setup.source.has_value());
  if (!setup.further.empty() && !setup.target.recipe) {
    fail("source.models: several sources become experts of one model when they are dense; these are mixtures of ", source.experts);
  }
  for (const WeightSource& other : setup.further) {
    bool& alike = setup.target.recipe->sources_alike;
    alike = (&other == &setup.further.front() || alike) && same_bytes(*setup.source, other);
  }
  if (setup.target.recipe && setup.target.recipe->of_mixture()) setup.routers = copied(setup.routers, setup.target.recipe->copies);
}

Setup prepare_run(const RunConfig& config, int ranks, bool speaks, bool accept_changes) {
  Setup setup;
  setup.directory = config.run.directory;
  check_run_directory(setup.directory);
  if (const auto newest = find_resume(config, speaks)) setup.resume.emplace(*newest);
  if (setup.resume) {
    refuse_other_run(config, *setup.resume, accept_changes, speaks);
    setup.target.architecture = architecture_from_hf(setup.resume->manifest().architecture, setup.resume->folder().string());
  } else {
    open_sources(config, setup, speaks);
  }
  refuse_what_does_not_divide(config, setup.target.architecture, ranks);
  open_data(config, setup, speaks);
  const CheckpointBytes bytes = checkpoint_bytes(setup.target.architecture, compute_dtype(config.train.precision));
  const uint64_t first = config.upcycle.optimizer == Moments::reset ? bytes.step_zero : bytes.full;
  check_free_space(setup.directory, setup.resume ? bytes.full : first + bytes.full,
                   setup.resume ? "one checkpoint" : "step 0 and one checkpoint");
  make_record(config, setup);
  return setup;
}

}  // namespace upcycle
