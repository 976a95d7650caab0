#include "train/hf_export.hpp"

#include <c10/core/ScalarType.h>

#include <charconv>
#include <cmath>
#include <functional>
#include <map>

#include "base/dtype.hpp"
#include "base/error.hpp"
#include "base/log.hpp"
#include "checkpoint/durable.hpp"
#include "checkpoint/safetensors.hpp"
#include "model/hf_names.hpp"
#include "train/balance.hpp"
#include "train/dense_source.hpp"
#include "train/origin.hpp"
#include "upcycle/merge.hpp"

namespace upcycle {

namespace fs = std::filesystem;

namespace {

/// Removes what it guards unless told to keep it.
class Partial {
 public:
  explicit Partial(fs::path path) : path_(std::move(path)) {}
  ~Partial() {
    std::error_code ignored;
    if (!kept_) fs::remove_all(path_, ignored);
  }
  Partial(const Partial&) = delete;
  Partial& operator=(const Partial&) = delete;
  void keep() noexcept { kept_ = true; }

 private:
  fs::path path_;
  bool kept_ = false;
};

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
  SafetensorsWriter::Item item;
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

/// What a job writes.
using ReadJob = std::function<Tensor(const Job&)>;

void write_tensors(const ReadJob& read, const fs::path& directory, const std::vector<Job>& all, uint64_t max_shard_bytes) {
  std::vector<SafetensorsWriter::Item> items;
  for (const Job& job : all) items.push_back(job.item);
  SafetensorsWriter writer(directory, std::move(items), max_shard_bytes, {{"format", "pt"}});  // transformers insists on "format"
  size_t done = 0;
  for (const Job& job : all) {
    writer.write(read(job).reshape(job.item.shape));
    log::progress(text("exporting tensor ", ++done, "/", all.size()));
  }
  writer.finish();
}

void copy_durably(const fs::path& from, const fs::path& to) {
  fs::copy_file(from, to);
  make_durable(to);
}

}  // namespace

ExportReport export_to_hf(const fs::path& checkpoint, const fs::path& directory, const ExportOptions& options) {
  const WeightSource source(checkpoint);
  if (!source.is_checkpoint()) fail(checkpoint.string(), ": not a checkpoint of this program");
  source.check();
  const Manifest manifest = read_manifest(source.folder());
  std::optional<Recipe> recipe;
  if (options.dense) {
    recipe = way_back(source, manifest);
  } else {
    refuse_what_hf_lacks(manifest, source.folder());
  }
  check_target(directory);

  Architecture architecture = recipe ? recipe->source : source.architecture();
  architecture.dtype = options.dtype.value_or(architecture.dtype);
  const std::vector<Job> all = jobs(architecture, architecture.dtype);
  ExportReport report{source.folder(), "", architecture.dtype, static_cast<int64_t>(all.size()), 0};
  for (const Job& job : all) report.bytes += static_cast<uint64_t>(elements(job.item.shape)) * c10::elementSize(job.item.dtype);
  constexpr uint64_t kSmallFiles = 64 << 20;   // tokenizer, headers, index
  check_free_space(directory, report.bytes + kSmallFiles, "the export");

  const nlohmann::json config = to_hf(architecture, source.config());
  report.architecture = config["architectures"][0];
  const fs::path staging = fs::path(directory / "").parent_path().string() + ".partial";   // without a trailing slash
  std::error_code error;
  fs::remove_all(staging, error);   // of an export that was killed
  if (!error) fs::create_directories(staging, error);
  if (error) fail(staging.string(), ": can't be made: ", error.message());
  Partial guard(staging);
  const ReadDense from_source = [&](const std::string& name, const Box& box) { return source.read(name, box); };
  const std::vector<ParameterSpec> specs = catalogue(architecture);
  const ReadJob read = [&](const Job& job) {
    return recipe ? merged(find(specs, job.parameter), *recipe, from_source) : from_source(job.parameter, job.box);
  };
  write_tensors(read, staging, all, options.max_shard_bytes);
  for (const fs::path& file : source.tokenizer_files()) copy_durably(file, staging / file.filename());
  nlohmann::json origin = {{"run_id", manifest.run_id}, {"step", manifest.step}, {"training", manifest.training},
                                 {"provenance", manifest.provenance}};
  if (recipe) origin["merged"] = text(recipe->copies, " copies of each feed-forward into one, by their mean");
  write_text_durably(staging / "upcycling.json", origin.dump(2) + "\n");
  write_text_durably(staging / "config.json", config.dump(2) + "\n");
  rename_durably(staging, directory);   // replaces an empty directory
  guard.keep();
  return report;
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
