#include "train/hf_export.hpp"

#include <c10/core/ScalarType.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <map>

#include "base/dtype.hpp"
#include "base/error.hpp"
#include "base/log.hpp"
#include "checkpoint/durable.hpp"
#include "checkpoint/shared_safetensors.hpp"
#include "model/hf_names.hpp"
#include "train/agreement.hpp"
#include "train/balance.hpp"
#include "train/byte_progress.hpp"
#include "train/dense_source.hpp"
#include "train/origin.hpp"
#include "train/run_directory.hpp"
#include "upcycle/merge.hpp"

namespace upcycle {

namespace fs = std::filesystem;

namespace {

/// What the run's model does and qwen3_moe has no word for.
void refuse_what_hf_lacks(const Manifest& manifest, const fs::path& checkpoint) {
  if (const int64_t layer = biased_layer(manifest.training); layer >= 0) {
    fail(checkpoint.string(), ": the router of layer ", layer, " has a balancing bias (balance.bias_rate), by which experts are chosen and ",
         "which is not part of its weights; Hugging Face's qwen3_moe can't express that");
  }
  const double capacity = manifest.run.value("balance", nlohmann::json::object()).value("capacity_factor", 0.0);
  if (capacity > 0) {
    fail(checkpoint.string(), ": balance.capacity_factor = ", capacity, ": tokens beyond an expert's capacity were dropped; Hugging Face's ",
         "qwen3_moe can't express that");
  }
}

Recipe way_back(const WeightSource& source, const Manifest& manifest) {
  const std::string where = source.folder().string();
  if (!source.architecture().is_moe()) fail(where, ": --dense merges experts, and this model is dense already");
  const auto recipe = recipe_of(source.folder(), manifest);
  if (!recipe) {
    fail(where, ": --dense needs to know which part of a dense model each expert was, and by which factor; this mixture's provenance has no ",
         "recipe: it was not grown out of a dense model by this program (a random start, or a directory of others)");
  }
  if (recipe->of_mixture()) {
    fail(where, ": --dense: this mixture grew out of a mixture of ", recipe->source.experts, " experts, not out of a dense model");
  }
  return *recipe;
}

void check_target(const fs::path& directory) {
  if (!fs::exists(directory)) return;
  if (!fs::is_directory(directory)) fail(directory.string(), ": is a file; name a new directory");
  if (!fs::is_empty(directory)) fail(directory.string(), ": holds files already; name a new or an empty directory");
}

/// One tensor of the target, and where it comes from.
struct Job {
  SafetensorsItem item;
  std::string parameter;
  Box box;
};

std::vector<Job> jobs(const Architecture& architecture, at::ScalarType dtype) {
  std::vector<Job> out;
  // An expert's three matrices side by side, as the hub has them.
  std::vector<std::vector<Job>> experts;   // [matrix][expert]
  const auto flush = [&] {
    for (size_t e = 0; !experts.empty() && e < experts.front().size(); ++e) {
      for (const std::vector<Job>& matrix : experts) out.push_back(matrix[e]);
    }
    experts.clear();
  };
  for (const ParameterSpec& spec : catalogue(architecture)) {
    std::vector<Job> tensors;
    for (const HfTensor& tensor : hf_tensors(spec, ExpertForm::one_by_one)) {
      tensors.push_back({{tensor.name, dtype, tensor.shape}, spec.name, tensor.ours});
    }
    if (spec.role == Role::expert) {
      experts.push_back(std::move(tensors));
      continue;
    }
    flush();
    out.push_back(tensors.front());
  }
  flush();
  return out;
}

/// The same export: what an interrupted one left may be gone on with.
std::string identity_of(const WeightSource& source, const Manifest& manifest, const ExportOptions& options) {
  return nlohmann::json{{"checkpoint", fs::absolute(source.folder()).lexically_normal().string()},
                        {"manifest", to_json(manifest)},
                        {"dense", options.dense}}.dump();   // the rest is in the headers
}

void copy_durably(const fs::path& from, const fs::path& to) {
  fs::copy_file(from, to, fs::copy_options::overwrite_existing);
  make_durable(to);
}

/// What every rank finds out by itself, before anything is written.
struct Plan {
  Plan(const fs::path& checkpoint, const fs::path& directory, const ExportOptions& options)
      : source(checkpoint), staging(fs::path(directory / "").parent_path().string() + ".partial") {   // without a trailing slash
    if (!source.is_checkpoint()) fail(checkpoint.string(), ": not a checkpoint of this program");
    source.check();
    manifest = read_manifest(source.folder());
    if (options.dense) {
      recipe = way_back(source, manifest);
    } else {
      refuse_what_hf_lacks(manifest, source.folder());
    }
    check_target(directory);
    architecture = recipe ? recipe->source : source.architecture();
    architecture.dtype = options.dtype.value_or(architecture.dtype);
    jobs = upcycle::jobs(architecture, architecture.dtype);
    specs = catalogue(architecture);
    for (const Job& job : jobs) bytes += static_cast<uint64_t>(elements(job.item.shape)) * c10::elementSize(job.item.dtype);
    constexpr uint64_t kSmallFiles = 64 << 20;   // tokenizer, headers, index
    const uint64_t needed = bytes + kSmallFiles;
    check_free_space(directory, needed - std::min(needed, room_taken(staging)), "the export");
  }

  /// The values of a block of a job's tensor.
  Tensor read(const Job& job, const Box& block) const {
    const auto from_source = [&](const std::string& name, const Box& box) { return source.read(name, box); };
    if (recipe) return merged(find(specs, job.parameter), block, *recipe, from_source);
    Box box = job.box;
    for (size_t d = 0, skip = box.begin.size() - block.begin.size(); d < block.begin.size(); ++d) {
      box.begin[skip + d] += block.begin[d], box.size[skip + d] = block.size[d];
    }
    return from_source(job.parameter, box).reshape(block.size);
  }

  WeightSource source;
  fs::path staging;
  Manifest manifest;
  std::optional<Recipe> recipe;
  Architecture architecture;
  std::vector<Job> jobs;
  std::vector<ParameterSpec> specs;
  uint64_t bytes = 0;
};

/// Each rank its blocks; nothing of it has its name yet.
void write_tensors(const Plan& plan, SharedSafetensors& writer) {
  uint64_t total = 0, done = 0;
  const auto bytes = [&](const SharedSafetensors::Block& block) {
    return static_cast<uint64_t>(elements(block.box)) * c10::elementSize(writer.item(block).dtype);
  };
  for (const SharedSafetensors::Block& block : writer.missing()) total += bytes(block);
  ByteProgress progress("exporting", plan.bytes - writer.found());
  for (const SharedSafetensors::Block& block : writer.missing()) {
    const Job& job = plan.jobs[block.item];
    while_doing("exporting " + job.item.name, [&] { writer.write(block, plan.read(job, block.box)); });
    progress.show(done += bytes(block), total);
  }
}

}  // namespace

ExportReport export_to_hf(const fs::path& checkpoint, const fs::path& directory, const ExportOptions& options, const Communicator& world) {
  std::optional<Plan> plan;
  world.together([&] { plan.emplace(checkpoint, directory, options); });
  agree(world, "the checkpoint", {{"step directory", plan->source.folder().string()}});
  std::vector<SafetensorsItem> items;
  for (const Job& job : plan->jobs) items.push_back(job.item);
  ByteProgress reading("looking at what an interrupted export left", plan->bytes);
  SharedSafetensors writer(plan->staging, std::move(items), options.max_shard_bytes, {{"format", "pt"}},   // transformers insists on "format"
                           world, identity_of(plan->source, plan->manifest, options),
                           [&](uint64_t done, uint64_t total) { reading.show(done, total); });
  if (writer.found() > 0) log::info(text("continuing: ", writer.found(), " of ", writer.bytes(), " bytes were there"));
  world.together([&] { write_tensors(*plan, writer); });

  const Manifest& manifest = plan->manifest;
  const nlohmann::json config = to_hf(plan->architecture, plan->source.config());
  world.together([&] {
    if (world.rank() != 0) return;
    for (const fs::path& file : plan->source.tokenizer_files()) copy_durably(file, plan->staging / file.filename());
    nlohmann::json origin = {{"run_id", manifest.run_id}, {"step", manifest.step}, {"training", manifest.training},
                             {"provenance", manifest.provenance}};
    if (plan->recipe) origin["merged"] = text(plan->recipe->copies, " copies of each feed-forward into one, by their mean");
    write_text_durably(plan->staging / "upcycling.json", origin.dump(2) + "\n");
    write_text_durably(plan->staging / "config.json", config.dump(2) + "\n");
  });
  writer.finish();
  world.together([&] {
    if (world.rank() == 0) rename_durably(plan->staging, directory);   // replaces an empty directory
  });
  return {plan->source.folder(), config["architectures"][0], plan->architecture.dtype, static_cast<int64_t>(plan->jobs.size()), plan->bytes};
}

uint64_t bytes_from_text(const std::string& size) {
  static const std::map<std::string, uint64_t> kUnits = {{"", 1},           {"B", 1},           {"KB", 1000},       {"MB", 1000'000},
                                                         {"GB", 1000'000'000}, {"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}};
  double number = 0;
  const auto [rest, error] = std::from_chars(size.data(), size.data() + size.size(), number);
  const auto unit = kUnits.find(std::string(rest, size.data() + size.size()));
  if (error != std::errc() || unit == kUnits.end() || !(number > 0) || !std::isfinite(number)) {
    fail("'", size, "' is no size: say 5GB, 500MB or 2GiB");
  }
  return std::max<uint64_t>(1, static_cast<uint64_t>(number * static_cast<double>(unit->second)));
}

}  // namespace upcycle
