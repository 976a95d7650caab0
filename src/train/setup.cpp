#include "train/setup.hpp"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "base/error.hpp"
#include "base/log.hpp"
#include "checkpoint/durable.hpp"
#include "train/layout_check.hpp"
#include "train/passes.hpp"
#include "train/run_directory.hpp"
#include "train/several_sources.hpp"

namespace upcycle {
namespace {

std::string content_of(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail("can't read ", path.string());
  return {std::istreambuf_iterator<char>(file), {}};
}

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

// The small files of a checkpoint: all that hold no tensors.
std::map<std::string, std::string> texts_of(const CheckpointReader& reader) {
  std::map<std::string, std::string> texts;
  const std::vector<std::string> tensors = reader.tensor_files();
  for (const auto& [name, size] : reader.manifest().files.items()) {
    if (std::find(tensors.begin(), tensors.end(), name) == tensors.end()) texts[name] = content_of(reader.folder() / name);
  }
  return texts;
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
  if (manifest.files.contains(kClustersFile)) record.texts[kClustersFile] = content_of(source.folder() / kClustersFile);
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
                                            : nlohmann::json::parse(content_of(config.source.architecture));
  record.architecture = to_hf(setup.target.architecture, extra);
  record.texts["config.json"] = record.architecture.dump(2) + "\n";
  std::vector<std::filesystem::path> files;
  if (!config.source.tokenizer.empty()) {
    files = tokenizer_files(config.source.tokenizer);
  } else if (setup.source) {
    files = setup.source->tokenizer_files();
  }
  for (const std::filesystem::path& file : files) record.texts["tokenizer/" + file.filename().string()] = content_of(file);
}

namespace {

// Another program's checkpoint is not damage: going on behind it would leave its steps aside without a word.
void refuse_other_schemas(const std::filesystem::path& directory) {
  std::error_code none;
  for (const auto& entry : std::filesystem::directory_iterator(directory / "checkpoints", none)) {
    if (!step_of(entry.path().filename().string()) || !std::filesystem::exists(entry.path() / kManifestFile)) continue;
    const auto manifest = nlohmann::json::parse(content_of(entry.path() / kManifestFile), nullptr, false);
    if (manifest.is_object() && manifest.contains("schema_version") && !reads_schema(manifest.value("schema_version", 0))) {
      read_manifest(entry.path());   // says which version, and what to do
    }
  }
}

// The newest valid checkpoint of the run directory; nothing in a new one. A run whose checkpoints are all damaged does not start
// again from its source behind the user's back.
std::optional<std::filesystem::path> find_resume(const RunConfig& config) {
  const std::filesystem::path directory = config.run.directory;
  refuse_other_schemas(directory);
  std::vector<std::string> refused;
  const auto newest = newest_checkpoint(directory, &refused);
  if (newest) {
    for (const std::string& line : refused) log::warning(line);
    return newest;
  }
  if (refused.empty()) return std::nullopt;
  std::string lines;
  for (const std::string& line : refused) lines += "\n  " + line;
  fail("run.directory = ", directory.string(), " has checkpoints, but none is valid:", lines,
       "\nRepair one, or move them away to start again from the source");
}

// A resumed run trains what its checkpoint holds. A dense one cannot grow experts any more: growing is what comes before step 0.
void refuse_other_model(const RunConfig& config, const CheckpointReader& resume, const Architecture& stored) {
  const std::string where = resume.folder().string();
  while_doing("resuming from " + where, [&] {
    if (config.moe.experts > 0 && !stored.is_moe()) {
      fail("it is a dense model, but [moe] asks for ", config.moe.experts, " experts. Give the mixture a run.directory of its own (",
           "source.model = \"", where, "\" works, too), or leave [moe] out to train the dense model on");
    }
    if (stored.is_moe()) refuse_contradiction(config.moe, stored);
  });
}

}  // namespace

Sampler open_validation(const RunConfig& config, int64_t vocab) {
  const bool own = !config.data.validation.empty();
  return {own ? config.data.validation : config.data.train, own ? std::array<int64_t, 3>{0, 1, 0} : config.data.split, Split::validation,
          config.train.sequence, vocab, static_cast<uint64_t>(config.run.seed), config.data.documents};
}

at::ScalarType compute_dtype(Precision precision) { return precision == Precision::bf16 ? at::kBFloat16 : at::kFloat; }

ReadDense reader_of(const Setup& setup) {
  std::vector<ReadDense::One> each;
  const auto add = [&](const WeightSource& source) { each.emplace_back([&source](const std::string& name, const Box& box) { return source.read(name, box); }); };
  if (setup.source) add(*setup.source);
  for (const WeightSource& source : setup.further) add(source);
  return ReadDense(std::move(each));
}

void open_sources(const RunConfig& config, Setup& setup) {
  if (const auto models = config.source.all(); !models.empty()) {
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

Setup prepare_run(const RunConfig& config, const Mesh& mesh) {
  Setup setup;
  setup.directory = config.run.directory;
  check_run_directory(setup.directory, config);
  if (const auto newest = find_resume(config)) setup.resume.emplace(*newest);
  if (setup.resume) {
    setup.target.architecture = architecture_from_hf(setup.resume->manifest().architecture, setup.resume->folder().string());
    refuse_other_model(config, *setup.resume, setup.target.architecture);
  } else {
    open_sources(config, setup);
  }
  refuse_what_does_not_divide(config, setup.target.architecture, mesh.grid().world());
  open_data(config, setup, mesh.world().rank() == 0);
  const CheckpointBytes bytes = checkpoint_bytes(setup.target.architecture, compute_dtype(config.train.precision));
  const uint64_t first = config.upcycle.optimizer == Moments::reset ? bytes.step_zero : bytes.full;
  check_free_space(setup.directory, setup.resume ? bytes.full : first + bytes.full,
                   setup.resume ? "one checkpoint" : "step 0 and one checkpoint");
  make_record(config, setup);
  return setup;
}

}  // namespace upcycle
