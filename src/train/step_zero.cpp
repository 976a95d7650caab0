#include "train/step_zero.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <set>

#include "base/autograd.hpp"
#include "base/error.hpp"
#include "base/log.hpp"
#include "checkpoint/safetensors_layout.hpp"
#include "checkpoint/writer.hpp"
#include "train/agreement.hpp"
#include "train/byte_progress.hpp"

namespace upcycle {

namespace fs = std::filesystem;

namespace {

constexpr int64_t kElements = 1 << 20;   // looked at at a time

/// Of each rank the same pieces, so that the writer may spread blocks as it likes; or each expert on one rank.
std::vector<Piece> pieces(const StepZero& step, const Communicator& world, const std::function<bool(const ParameterSpec&)>& wanted,
                          const std::function<void(const ParameterSpec&, Piece&)>& complete) {
  std::vector<Piece> out;
  for (const ParameterSpec& spec : step.specs) {
    if (!wanted(spec)) continue;
    const auto add = [&](const Box& box) {
      Piece piece{.name = spec.name, .shape = spec.shape, .box = box, .local = {}};
      complete(spec, piece);
      out.push_back(std::move(piece));
    };
    if (!step.by_expert || spec.role != Role::expert) {
      add(whole(spec.shape));
      continue;
    }
    for (int64_t e = world.rank(); e < spec.shape[0]; e += world.size()) {
      Box box = whole(spec.shape);
      box.begin[0] = e, box.size[0] = 1;
      add(box);
    }
  }
  return out;
}

/// fp32 memory of a part's size, the same one again and again.
class Scratch32 {
 public:
  Tensor of(const Shape& size) {
    const int64_t count = elements(size);
    if (!memory_.defined() || memory_.numel() < count) memory_ = at::empty({count}, at::kFloat);
    return memory_.narrow(0, 0, count).view(size);
  }

 private:
  Tensor memory_;
};

/// The parameters of which some value changes when it is rounded to their stored dtype.
std::set<std::string> rounded(const StepZero& step, const Communicator& world, const std::function<void()>& alive) {
  Tensor flags = at::zeros({static_cast<int64_t>(step.specs.size())}, at::kLong);
  world.together([&] {
    Scratch32 scratch;
    for (size_t i = 0; i < step.specs.size(); ++i) {
      const ParameterSpec& spec = step.specs[i];
      if (step.exact(spec)) continue;
      int64_t turn = 0;
      for (const Box& box : row_blocks(spec.shape, kElements)) {
        if (turn++ % world.size() != world.rank()) continue;
        const Tensor values = scratch.of(box.size);
        step.fill(spec, box, values);
        alive();
        if (at::equal(values.to(step.stored(spec)).to(at::kFloat), values)) continue;
        flags[static_cast<int64_t>(i)] = 1;
        break;
      }
    }
  });
  world.all_reduce(flags, Reduce::max);
  std::set<std::string> names;
  for (size_t i = 0; i < step.specs.size(); ++i) {
    if (flags[static_cast<int64_t>(i)].item<int64_t>() != 0) names.insert(step.specs[i].name);
  }
  return names;
}

/// Source values where they lie in the mapped files, for one that goes through them once.
ReadDense lookers_of(const Setup& setup) {
  std::vector<ReadDense::One> each;
  const auto add = [&](const WeightSource& source) {
    each.emplace_back([&source](const std::string& name, const Box& box) { return source.look(name, box); });
  };
  add(*setup.source);
  for (const WeightSource& source : setup.further) add(source);
  return ReadDense(std::move(each));
}

bool all_store(const Setup& setup, const std::string& name, at::ScalarType dtype) {
  return setup.source->stored(name) == dtype &&
         std::all_of(setup.further.begin(), setup.further.end(), [&](const WeightSource& source) { return source.stored(name) == dtype; });
}

}  // namespace

StepZero step_zero_of(const RunConfig& run, const Setup& setup) {
  const at::ScalarType compute = compute_dtype(run.train.precision);
  StepZero step;
  step.specs = catalogue(setup.target.architecture);
  step.stored = [compute](const ParameterSpec& spec) { return spec.always_fp32() ? at::kFloat : compute; };
  const auto is_fp32 = [compute](const ParameterSpec& spec) { return spec.always_fp32() || compute == at::kFloat; };
  if (!setup.source) {
    step.exact = is_fp32;
    step.fill = random(setup.target.architecture, static_cast<uint64_t>(run.run.seed));
    return step;
  }
  const ReadDense read = lookers_of(setup);
  if (!setup.target.recipe) {
    step.exact = [&setup, is_fp32, compute](const ParameterSpec& spec) { return is_fp32(spec) || all_store(setup, spec.name, compute); };
    step.fill = as_they_are(read);
  } else {
    const Recipe& recipe = *setup.target.recipe;
    step.exact = [&setup, &recipe, is_fp32, compute](const ParameterSpec& spec) {
      return is_fp32(spec) || (keeps(spec, recipe, compute) && all_store(setup, source_name(spec, recipe), compute));
    };
    step.fill = [&recipe, read, facts = ExpertFacts{}](const ParameterSpec& spec, const Box& box, Tensor target) mutable {
      grow(spec, box, recipe, read, std::move(target), &facts);
    };
    step.by_expert = recipe.noise > 0 || recipe.drop > 0;
  }
  if (run.upcycle.optimizer != Moments::reset) {
    step.moment = [&run, &setup](const ParameterSpec& spec, const Box& box, bool second, Tensor target) {
      const ReadDense moments = [&](const std::string& name, const Box& part) { return setup.source->read_moment(second, name, part); };
      const auto& recipe = setup.target.recipe;
      recipe ? grow_moment(spec, box, *recipe, run.upcycle.optimizer, second, moments, target) : void(target.copy_(moments(spec.name, box)));
    };
  }
  return step;
}

uint64_t write_step_zero(const StepZero& step, const fs::path& folder, Manifest manifest, const std::map<std::string, std::string>& texts,
                         const Communicator& world, const std::string& identity, const CheckpointSection& settings, const std::function<void()>& alive) {
  const Unrecorded guard;
  const std::set<std::string> keeps_master = rounded(step, world, alive);
  const auto size = [&](const ParameterSpec& spec, at::ScalarType dtype) { return static_cast<uint64_t>(elements(spec.shape)) * c10::elementSize(dtype); };
  uint64_t bytes = 0, written = 0;
  for (const ParameterSpec& spec : step.specs) {
    bytes += size(spec, step.stored(spec)) + (keeps_master.contains(spec.name) ? size(spec, at::kFloat) : 0) + (step.moment ? 2 * size(spec, at::kFloat) : 0);
  }
  ByteProgress progress("writing " + folder.filename().string(), bytes);
  uint64_t of_file = 0;
  WriteOptions options = write_options(settings);
  options.continues = identity;
  options.progress = [&](uint64_t done, uint64_t total) {
    const double share = total == 0 ? 1.0 : static_cast<double>(done) / static_cast<double>(total);
    progress.show(written + static_cast<uint64_t>(share * static_cast<double>(of_file)), bytes);
    alive();
  };
  CheckpointWriter writer(folder, world, options);
  const auto add = [&](const char* file, const std::vector<Piece>& all) {
    of_file = 0;
    for (const ParameterSpec& spec : step.specs) {
      if (const auto piece = std::find_if(all.begin(), all.end(), [&](const Piece& p) { return p.name == spec.name; }); piece != all.end()) {
        of_file += size(spec, piece->stored);
      }
    }
    writer.add(file, all);
    written += of_file;
  };
  const auto every = [](const ParameterSpec&) { return true; };

  Scratch32 scratch;
  add(kWeightsFile, pieces(step, world, every, [&](const ParameterSpec& spec, Piece& piece) {
    piece.stored = step.stored(spec);
    piece.read = [&, exact = step.exact(spec)](const Box& part, Tensor target) {
      if (exact) return step.fill(spec, part, target);
      const Tensor values = scratch.of(part.size);
      step.fill(spec, part, values);
      target.copy_(values);
    };
  }));
  if (!keeps_master.empty()) {
    add(kMastersFile, pieces(step, world, [&](const ParameterSpec& spec) { return keeps_master.contains(spec.name); },
                             [&](const ParameterSpec& spec, Piece& piece) {
      piece.read = [&](const Box& part, Tensor target) { step.fill(spec, part, target); };
    }));
  }
  for (const bool second : {false, true}) {
    if (!step.moment) break;
    add(second ? kSecondMomentsFile : kFirstMomentsFile, pieces(step, world, every, [&](const ParameterSpec& spec, Piece& piece) {
      piece.read = [&, second](const Box& part, Tensor target) { step.moment(spec, part, second, target); };
    }));
  }
  for (const auto& [name, content] : texts) writer.add_text(name, content);
  writer.commit(std::move(manifest));
  return bytes;
}

std::string identity_of_step_zero(const RunConfig& run, const Setup& setup, bool as_stored) {
  nlohmann::json out = {{"architecture", to_hf(setup.target.architecture, nlohmann::json::object())}, {"files", nlohmann::json::array()}};
  const auto add = [&](const WeightSource& source) { out["files"].push_back(facts_of_directory("source", source.folder())); };
  if (setup.source) add(*setup.source);
  for (const WeightSource& source : setup.further) add(source);
  if (as_stored) return out.dump();
  const nlohmann::json all = nlohmann::json::parse(to_json(run));
  out["precision"] = all["train"]["precision"];
  out["optimizer"] = all["upcycle"]["optimizer"];
  out["seed"] = all["run"]["seed"];
  if (setup.target.recipe) out["recipe"] = to_json(*setup.target.recipe);
  return out.dump();
}

Manifest manifest_of_step_zero(const RunConfig& run, const Setup& setup, int ranks) {
  TrainingState state;
  state.routers = setup.routers;
  Manifest manifest = manifest_of(setup.record, state, run.upcycle.optimizer != Moments::reset ? setup.source->updates() : 0.0);
  manifest.layout = {{"ranks", ranks}};
  return manifest;
}

uint64_t most_bytes(const StepZero& step) {
  uint64_t bytes = 0;
  for (const ParameterSpec& spec : step.specs) {
    const uint64_t width = c10::elementSize(step.stored(spec)) + (step.exact(spec) ? 0 : 4) + (step.moment ? 8 : 0);
    bytes += static_cast<uint64_t>(elements(spec.shape)) * width;
  }
  return bytes;
}

bool only_stores_step_zero(const RunConfig& run, const Setup& setup) {
  return run.train.steps == 0 && !setup.resume && !setup.validation && !(setup.target.recipe && run.upcycle.certify);
}

fs::path store_step_zero(const RunConfig& run, Setup& setup, const Communicator& world, const std::function<void(const char*)>& alive) {
  if (setup.target.recipe && setup.target.recipe->permutation == UnitOrder::clusters) {
    find_clusters(*setup.target.recipe, reader_of(setup), world, [&] { alive("clustering"); });
    setup.record.texts[kClustersFile] = clusters_to_text(*setup.target.recipe);
  }
  const fs::path folder = setup.directory / "checkpoints" / step_directory(0);
  log::info("no steps, no certificate and no validation: step 0 is written block by block, without a model");
  write_step_zero(step_zero_of(run, setup), folder, manifest_of_step_zero(run, setup, world.size()), setup.record.texts, world,
                  world.broadcast(identity_of_step_zero(run, setup, false), 0), run.checkpoint, [&] { alive("writing a checkpoint"); });
  return folder;
}

}  // namespace upcycle
