#include "train/convert.hpp"

#include <xxhash.h>

#include <algorithm>
#include <cstdio>

#include "base/error.hpp"
#include "base/log.hpp"
#include "checkpoint/durable.hpp"
#include "checkpoint/run_lock.hpp"
#include "train/dense_source.hpp"
#include "train/run_directory.hpp"
#include "train/setup.hpp"
#include "train/step_zero.hpp"
#include "upcycle/certificate.hpp"

namespace upcycle {

namespace fs = std::filesystem;

namespace {

/// A Hugging Face directory as it is: bf16 stays bf16, everything else becomes fp32, routers always.
StepZero as_stored(const WeightSource& source) {
  StepZero step;
  step.specs = catalogue(source.architecture());
  step.stored = [&source](const ParameterSpec& spec) {
    return !spec.always_fp32() && source.stored(spec.name) == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
  };
  step.exact = [](const ParameterSpec&) { return true; };
  step.fill = [&source](const ParameterSpec& spec, const Box& box, Tensor target) { target.copy_(source.look(spec.name, box)); };
  return step;
}

/// Holds what is grown against the source, value by value, before it is written: what lies in the checkpoint was right, whoever wrote it.
void certify_weights(StepZero& step, const Recipe& recipe, const ReadDense& read) {
  step.fill = [fill = std::move(step.fill), &recipe, read](const ParameterSpec& spec, const Box& box, Tensor target) {
    fill(spec, box, target);
    WeightLevel level;
    level.check(spec, box, target, recipe, read);
    if (level.mismatches > 0) {
      throw std::runtime_error(text("the grown weights are not what the recipe promises: ", level.mismatches, " of ", level.comparisons,
                                    " values are wrong, first ", level.first_mismatch));
    }
  };
}

void check(const RunConfig& run, Setup& setup, bool speaks) {
  setup.directory = run.run.directory;
  if (run.source.all().empty()) fail("source.model is missing: convert reads a Hugging Face directory, or a checkpoint that is to grow");
  open_sources(run, setup, speaks);
  if (!setup.target.recipe && setup.source->is_checkpoint()) {
    fail("source.model = ", run.source.model, " is a checkpoint already: train reads it as it is");
  }
  check_run_directory(setup.directory);
  if (const auto there = newest_checkpoint(setup.directory)) {
    fail("run.directory = ", setup.directory.string(), " has a checkpoint, ", there->filename().string(), ": name another directory");
  }
  make_record(run, setup);
}

std::string digits(const std::string& of) {
  char out[20];
  std::snprintf(out, sizeof out, "%016llx", static_cast<unsigned long long>(XXH3_64bits(of.data(), of.size())));
  return out;
}

/// The same for every attempt, so that the bytes are.
Manifest describe(const RunConfig& run, const Setup& setup, const Communicator& world, const std::string& identity) {
  Manifest manifest = manifest_of_step_zero(run, setup, world.size());
  manifest.provenance["command"] = "convert";
  if (!setup.target.recipe) {
    manifest.run_id = run.run.name + "-converted";
    manifest.training = nlohmann::json::object();
    return manifest;
  }
  manifest.run_id = run.run.name + "-" + digits(identity + fs::absolute(setup.directory).string());
  if (run.upcycle.certify) manifest.provenance["certificate"] = "weights";
  return manifest;
}

}  // namespace

fs::path convert_to_checkpoint(const RunConfig& run, const Communicator& world, const std::function<void()>& alive) {
  const fs::path directory = run.run.directory, folder = directory / "checkpoints" / step_directory(0);
  Setup setup;
  StepZero step;
  std::string identity;
  world.together([&] {
    check(run, setup, world.rank() == 0);
    const bool grows = setup.target.recipe.has_value();
    step = grows ? step_zero_of(run, setup) : as_stored(*setup.source);
    identity = identity_of_step_zero(run, setup, !grows);
    const uint64_t needed = most_bytes(step);
    check_free_space(folder, needed - std::min(needed, room_taken(folder.string() + ".partial")), "the checkpoint");
  });
  std::optional<RunLock> lock;
  world.together([&] {
    if (world.rank() != 0) return;
    lock.emplace(directory);
    claim_run_directory(directory, run);
  });
  const auto living = [&] {
    if (lock) lock->touch();
    alive();
  };

  if (setup.target.recipe) {
    const ReadDense read = reader_of(setup);
    if (setup.target.recipe->permutation == UnitOrder::clusters) {
      find_clusters(*setup.target.recipe, read, world, living);
      setup.record.texts[kClustersFile] = clusters_to_text(*setup.target.recipe);
    }
    if (run.upcycle.certify) certify_weights(step, *setup.target.recipe, read);
  }
  log::info(text(setup.target.recipe ? "growing experts out of " : "converting ", setup.source->folder().string(), ": ",
                 count_parameters(setup.target.architecture).total, " parameters, by ", world.size(), " ranks"));
  write_step_zero(step, folder, describe(run, setup, world, identity), setup.record.texts, world, world.broadcast(identity, 0), run.checkpoint, living);
  return folder;
}

}  // namespace upcycle
