#include "train/resume.hpp"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.hpp"
#include "base/lines.hpp"
#include "base/log.hpp"
#include "base/text_file.hpp"
#include "train/dense_source.hpp"
#include "train/origin.hpp"
#include "train/run_changes.hpp"
#include "train/target.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

// A folder that can't be looked into is not one without checkpoints.
void refuse_unreadable(const fs::path& checkpoints) {
  std::error_code error;
  if (!fs::exists(fs::symlink_status(checkpoints, error))) return;
  fs::directory_iterator(checkpoints, error);
  if (error) fail(checkpoints.string(), ": ", error.message(), ": checkpoints of this run may be in there. Make it a directory that can be read");
}

// Another program's checkpoint is not damage: going on behind it would leave its steps aside without a word.
void refuse_other_schemas(const fs::path& checkpoints) {
  std::error_code none;
  for (const auto& entry : fs::directory_iterator(checkpoints, none)) {
    if (!step_of(entry.path().filename().string()) || !fs::exists(entry.path() / kManifestFile)) continue;
    const json manifest = json::parse(text_of(entry.path() / kManifestFile), nullptr, false);
    if (manifest.is_object() && manifest.contains("schema_version") && !reads_schema(manifest.value("schema_version", 0))) {
      read_manifest(entry.path());   // says which version, and what to do, where it can't be read
    }
  }
}

// The architecture of what the run file names, without looking at its weights; nothing where it is not there any more.
std::optional<Architecture> named_architecture(const RunConfig& config) {
  if (!config.source.architecture.empty() && fs::exists(config.source.architecture)) return read_architecture(config.source.architecture);
  if (config.source.all().empty()) return std::nullopt;
  const fs::path model = config.source.all().front();
  if (const auto step = newest_checkpoint(model)) return architecture_from_hf(read_manifest(*step).architecture, (*step / kManifestFile).string());
  if (fs::exists(model / "config.json")) return read_architecture(model / "config.json");
  return std::nullopt;
}

// The same files in another place: moved there, or linked. Sizes alone would not tell two models of one shape apart, so nothing may be left
// in the old place.
bool same_source(const RunConfig& stored, const RunConfig& config, const json& provenance) {
  const json source = provenance.is_object() ? provenance.value("source", json()) : json();
  if (!source.is_object()) return false;
  const json models = source.contains("models") ? source["models"] : json::array({source});
  const std::vector<std::string> named = config.source.all();
  const std::vector<std::string> before = stored.source.all();
  if (!models.is_array() || models.size() != named.size() || before.size() != named.size()) return false;
  try {
    for (size_t i = 0; i < named.size(); ++i) {
      std::error_code none;
      if (fs::exists(before[i]) && !fs::equivalent(before[i], named[i], none)) return false;
      const json here = WeightSource(named[i]).provenance();
      for (const char* key : {"kind", "files", "run_id", "step"}) {
        if (here.value(key, json()) != models[i].value(key, json())) return false;
      }
    }
  } catch (const UserError&) {   // not there, or not readable: not known to be the same
    return false;
  }
  return true;
}

// A mixture that came out of another run's checkpoint as it was, with that run's recipe.
bool taken_as_it_was(const json& provenance) {
  const auto member = [](const json& object, const char* key) { return object.is_object() ? object.value(key, json()) : json(); };
  const json recipe = member(provenance, "recipe");
  return !recipe.is_null() && recipe == member(member(member(provenance, "source"), "provenance"), "recipe");
}

struct Differences {
  std::vector<std::string> model;    ///< lines; they can't be gone on with
  std::vector<std::string> course;   ///< they can
};

void compare_keys(const RunConfig& config, const CheckpointReader& resume, Differences& out) {
  const Manifest& manifest = resume.manifest();
  const RunConfig stored = run_from_json(manifest.run.dump(), (resume.folder() / kManifestFile).string());
  const int64_t steps_done = manifest.training.is_object() ? manifest.training.value("step", int64_t{0}) : 0;
  // A mixture may be taken as it is, with or without a [moe] that agrees: then the architectures tell.
  const bool both_grow = stored.moe.experts > 0 && config.moe.experts > 0;
  std::optional<bool> moved;
  for (const RunChange& change : run_changes(stored, config, steps_done)) {
    const std::string section = change.section();
    if (section == "moe" && !both_grow) continue;
    if (change.key == "source.model" || change.key == "source.models") {
      if (!moved) moved = same_source(stored, config, manifest.provenance);
      if (*moved) continue;
    }
    (section == "moe" || section == "upcycle" || section == "source" ? out.model : out.course).push_back(line_of(change));
  }
}

void compare_models(const RunConfig& config, const CheckpointReader& resume, const Architecture& stored, Differences& out) {
  const Manifest& manifest = resume.manifest();
  const std::optional<Recipe> grew = recipe_of(resume.folder(), manifest);
  const Architecture source = named_architecture(config).value_or(grew && !taken_as_it_was(manifest.provenance) ? grew->source : stored);
  const Target asked = choose_target(config, source, !config.source.all().empty());
  for (const std::string& line : differences(asked.architecture, stored)) out.model.push_back(line);
  if (!asked.recipe || !grew) return;
  static const std::set<std::string> kFollow = {"seed", "dtype", "exactness", "lossless", "sources_alike"};   // from other things
  const json here = to_json(*asked.recipe), there = manifest.provenance["recipe"];
  for (const auto& [key, value] : here.items()) {
    if (kFollow.contains(key) || !there.contains(key) || there[key] == value) continue;
    out.model.push_back(text("recipe, ", key, ": ", there[key].dump(), " there, ", value.dump(), " here"));
  }
}

// Those that travel in checkpoints and exports. They may be gone by now, or be named for plan alone.
void compare_tokenizers(const RunConfig& config, const CheckpointReader& resume, Differences& out) {
  if (config.source.tokenizer.empty() || !fs::exists(config.source.tokenizer)) return;
  const std::map<std::string, std::string> there = texts_of(resume), here = carried_tokenizer(tokenizer_files(config.source.tokenizer));
  for (const auto& [name, content] : here) {
    const auto stored = there.find(name);
    if (stored != there.end() && stored->second == content) continue;
    out.course.push_back(text("source.tokenizer, ", fs::path(name).filename().string(), ": ", stored == there.end() ? "absent" : "another file", " there, ",
                              content.size(), " bytes here"));
  }
}

}  // namespace

std::map<std::string, std::string> texts_of(const CheckpointReader& reader) {
  std::map<std::string, std::string> texts;
  for (const auto& [name, size] : reader.manifest().files.items()) {
    if (fs::path(name).extension() != ".h5") texts[name] = text_of(reader.folder() / name);
  }
  return texts;
}

std::optional<fs::path> find_resume(const RunConfig& config, bool speaks) {
  const fs::path directory = config.run.directory;
  refuse_unreadable(directory / "checkpoints");
  refuse_other_schemas(directory / "checkpoints");
  std::vector<std::string> refused;
  const auto newest = newest_checkpoint(directory, &refused);
  if (newest) {
    for (const std::string& line : refused) {
      if (speaks) log::warning(line + ": going on behind it, from " + newest->filename().string());
    }
    return newest;
  }
  if (!refused.empty()) {
    fail("run.directory = ", directory.string(), " has checkpoints, but none is valid:", listed(refused),
         "\nRepair one, or move ", directory.string(), " away to start again from the source");
  }
  // It is begun when step 0 has been stored.
  if (fs::exists(directory / "metrics.jsonl")) {
    fail("run.directory = ", directory.string(), ": metrics.jsonl tells of a run, but its checkpoints are gone. Put them back into ",
         (directory / "checkpoints").string(), ", or name another directory to start again from the source");
  }
  return std::nullopt;
}

void refuse_other_run(const RunConfig& config, const CheckpointReader& resume, bool accept_changes, bool speaks) {
  const std::string where = resume.folder().string();
  const Architecture stored = architecture_from_hf(resume.manifest().architecture, where);
  if (config.moe.experts > 0 && !stored.is_moe()) {
    fail("resuming from ", where, ": it is a dense model, but [moe] asks for ", config.moe.experts, " experts. Give the mixture a ",
         "run.directory of its own (source.model = \"", where, "\" works, too), or leave [moe] out to train the dense model on");
  }
  Differences found;
  compare_keys(config, resume, found);
  while_doing("resuming from " + where, [&] { compare_models(config, resume, stored, found); });
  compare_tokenizers(config, resume, found);
  if (!found.model.empty()) {
    std::string others;
    if (!found.course.empty()) others = text("\nThese keys differ, too:", listed(found.course));
    fail("run.directory = ", config.run.directory, ": ", where, " holds another model than the run file asks for:", listed(found.model), others,
         "\nWhat the weights come from, and how, is decided before step 0. Go back to these values (", where, "/manifest.json has all of them), or give ",
         "this run a directory of its own; source.model = \"", where, "\" would begin with the weights that are there");
  }
  if (found.course.empty()) return;
  if (!accept_changes) {
    fail("run.directory = ", config.run.directory, ": these keys are not those with which ", where, " was trained, and change what is computed:",
         listed(found.course), "\nGo back to these values (", where, "/manifest.json has all of them), give the changed run a directory of its own, ",
         "or go on with them: --accept-changes");
  }
  if (speaks) log::warning("going on from " + where + " with changes (--accept-changes):" + listed(found.course));
}

}  // namespace upcycle
