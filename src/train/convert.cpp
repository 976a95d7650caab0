#include "train/convert.hpp"

#include <fstream>
#include <map>

#include "base/error.hpp"
#include "base/log.hpp"
#include "checkpoint/durable.hpp"
#include "checkpoint/run_lock.hpp"
#include "checkpoint/writer.hpp"
#include "train/dense_source.hpp"
#include "train/run_directory.hpp"

namespace upcycle {

namespace fs = std::filesystem;

namespace {

/// As a checkpoint stores `stored` values of `spec`.
at::ScalarType kept_as(const ParameterSpec& spec, at::ScalarType stored) {
  return stored == at::kBFloat16 && !spec.always_fp32() ? at::kBFloat16 : at::kFloat;
}

/// The dtype of the whole parameter: the widest of its parts.
at::ScalarType kept_as(const ParameterSpec& spec, const std::vector<WeightSource::Mapped>& parts) {
  for (const WeightSource::Mapped& part : parts) {
    if (kept_as(spec, part.view.scalar_type()) == at::kFloat) return at::kFloat;
  }
  return at::kBFloat16;
}

/// This rank's share: rows of what is large, whole tensors of what is small.
std::vector<Piece> share(const WeightSource& source, int64_t rank, int64_t ranks) {
  constexpr int64_t kLarge = 1 << 20;
  std::vector<Piece> out;
  int64_t turn = 0;
  for (const ParameterSpec& spec : catalogue(source.architecture())) {
    const std::vector<WeightSource::Mapped> parts = source.mapped(spec);
    const at::ScalarType dtype = kept_as(spec, parts);
    for (const auto& [box, view] : parts) {
      Box mine = box;
      if (elements(box) >= kLarge && box.size[0] >= ranks) {
        const int64_t begin = rank * box.size[0] / ranks, end = (rank + 1) * box.size[0] / ranks;
        mine.begin[0] += begin;
        mine.size[0] = end - begin;
      } else if (turn++ % ranks != rank) {
        continue;
      }
      // `to` returns the mapped view itself where the dtype is right: then nothing is copied.
      out.push_back({spec.name, spec.shape, mine, view.narrow(0, mine.begin[0] - box.begin[0], mine.size[0]).to(dtype)});
    }
  }
  return out;
}

uint64_t checkpoint_size(const WeightSource& source) {
  uint64_t bytes = 0;
  for (const ParameterSpec& spec : catalogue(source.architecture())) {
    bytes += static_cast<uint64_t>(elements(spec.shape)) * c10::elementSize(kept_as(spec, source.mapped(spec)));
  }
  return bytes;
}

std::string bytes_of_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(path.string(), ": can't be read");
  return {std::istreambuf_iterator<char>(file), {}};
}

/// Tokenizer and generation files that travel along: those of [source] tokenizer, else the model's.
std::vector<fs::path> companions(const RunConfig& run, const WeightSource& source) {
  return run.source.tokenizer.empty() ? source.tokenizer_files() : tokenizer_files(run.source.tokenizer);
}

void check(const RunConfig& run, const WeightSource& source, const fs::path& folder) {
  if (source.is_checkpoint()) fail("source.model = ", run.source.model, " is a checkpoint already: train reads it as it is");
  source.check();
  companions(run, source);
  check_run_directory(run.run.directory);
  if (const auto there = newest_checkpoint(run.run.directory)) {
    fail("run.directory = ", run.run.directory, " has a checkpoint, ", there->filename().string(), ": name another directory");
  }
  check_free_space(folder, checkpoint_size(source), "the checkpoint");
}

Manifest describe(const RunConfig& run, const WeightSource& source, int ranks) {
  Manifest manifest;
  manifest.run_id = run.run.name + "-converted";
  manifest.architecture = to_hf(source.architecture(), source.config());
  manifest.run = nlohmann::json::parse(to_json(run));
  manifest.provenance = {{"program", "upcycle"}, {"command", "convert"}, {"source", source.provenance()}};
  manifest.training = nlohmann::json::object();
  manifest.layout = {{"ranks", ranks}};
  return manifest;
}

}  // namespace

fs::path convert_to_checkpoint(const RunConfig& run, const Communicator& world) {
  const fs::path directory = run.run.directory, folder = directory / "checkpoints" / step_directory(0);
  std::optional<WeightSource> source;
  world.together([&] {
    if (!run.source.models.empty()) fail("source.models: convert takes one model; name it in source.model");
    if (run.source.model.empty()) fail("source.model is missing: convert reads a Hugging Face directory");
    source.emplace(run.source.model);
    check(run, *source, folder);
  });
  std::optional<RunLock> lock;
  world.together([&] {
    if (world.rank() != 0) return;
    lock.emplace(directory);
    claim_run_directory(directory, run);
  });

  CheckpointWriter writer(folder, world);
  const std::vector<Piece> pieces = share(*source, world.rank(), world.size());
  log::info(text("converting ", run.source.model, ": ", count_parameters(source->architecture()).total, " parameters"));
  writer.add(kWeightsFile, pieces);
  const Manifest manifest = describe(run, *source, world.size());
  writer.add_text("config.json", manifest.architecture.dump(2) + "\n");
  for (const fs::path& file : companions(run, *source)) {
    std::string content;
    world.together([&] { content = bytes_of_file(file); });
    writer.add_text("tokenizer/" + file.filename().string(), content);
  }
  writer.commit(manifest);
  return folder;
}

}  // namespace upcycle
