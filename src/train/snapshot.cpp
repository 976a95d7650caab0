#include "train/snapshot.hpp"

#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>


#include "base/autograd.hpp"
#include "base/dtype.hpp"
#include "checkpoint/writer.hpp"

namespace upcycle {
namespace {

using TensorOf = std::function<Tensor(size_t index)>;   // of weight `index`: its value, master or moments

// One of the ranks that hold `part`'s box writes it; which one depends on the name, so that the work is spread.
bool is_writer(const Part& part, const Layout& layout, int rank) {
  std::vector<int> holders;
  for (int other = 0; other < layout.grid.world(); ++other) {
    if (local_box(part.spec, layout, layout.grid.at(other)) == part.box) holders.push_back(other);
  }
  return holders[std::hash<std::string>{}(part.spec.name) % holders.size()] == rank;
}

// All parts of this rank's weights, in a fixed order, as pieces of what `of` gives.
std::vector<Piece> pieces(const Weights& weights, const TensorOf& of, const std::function<bool(const Part&)>& wanted) {
  std::vector<Piece> pieces;
  for (size_t index = 0; index < weights.all().size(); ++index) {
    for (const Part& part : weights.all()[index].parts) {
      if (wanted(part)) pieces.push_back({part.spec.name, part.spec.shape, part.box, part.of(of(index))});
    }
  }
  return pieces;
}

// The names of parameters whose value in the compute dtype is not exactly the master, on any rank.
std::set<std::string> rounded(const Weights& weights, const Communicator& world) {
  std::vector<std::string> names;
  for (const ParameterSpec& spec : catalogue(weights.architecture())) names.push_back(spec.name);
  Tensor flags = at::zeros({static_cast<int64_t>(names.size())}, at::kLong);
  for (const Weight& weight : weights.all()) {
    if (weight.parameter.value.is_alias_of(weight.parameter.master)) continue;
    for (const Part& part : weight.parts) {
      const Tensor master = part.of(weight.parameter.master);
      const bool same = at::equal(part.of(weight.parameter.value).to(at::kFloat), master);
      const auto at = std::find(names.begin(), names.end(), part.spec.name) - names.begin();
      if (!same) flags[at] = 1;
    }
  }
  world.all_reduce(flags, Reduce::max);
  std::set<std::string> result;
  for (size_t i = 0; i < names.size(); ++i) {
    if (flags[static_cast<int64_t>(i)].item<int64_t>()) result.insert(names[i]);
  }
  return result;
}

nlohmann::json layout_record(const Grid& grid) {
  nlohmann::json layout = {{"ranks", grid.world()}};
  for (const Axis axis : {Axis::tensor, Axis::context, Axis::data, Axis::pipeline, Axis::expert_tensor, Axis::expert, Axis::expert_data}) {
    layout[name(axis)] = grid.size(axis);
  }
  return layout;
}

}  // namespace

std::filesystem::path save_checkpoint(const std::filesystem::path& checkpoints, const Mesh& mesh, Weights& weights,
                                      Optimizer* optimizer, const TrainingState& state, const RunRecord& record,
                                      const std::function<void()>& alive) {
  const Unrecorded guard;
  const Communicator& world = mesh.world();
  const std::filesystem::path folder = checkpoints / step_directory(state.step);
  const std::set<std::string> keep_master = rounded(weights, world);
  const auto mine = [&](const Part& part) { return is_writer(part, weights.layout(), world.rank()); };
  const auto value = [&](size_t index) { return weights.all()[index].parameter.value; };
  const auto master = [&](size_t index) { return weights.all()[index].parameter.master; };

  CheckpointWriter writer(folder, world);
  const auto add = [&](const char* file, const std::vector<Piece>& pieces) {
    writer.add(file, pieces);
    alive();
  };
  add(kWeightsFile, pieces(weights, value, mine));
  if (!keep_master.empty()) {
    add(kMastersFile, pieces(weights, master, [&](const Part& p) { return mine(p) && keep_master.contains(p.spec.name); }));
  }
  if (optimizer) {
    add(kFirstMomentsFile, pieces(weights, [&](size_t index) { return optimizer->exp_avg(index); }, mine));
    add(kSecondMomentsFile, pieces(weights, [&](size_t index) { return optimizer->exp_avg_sq(index); }, mine));
  }
  for (const auto& [name, content] : record.texts) writer.add_text(name, content);

  Manifest manifest;
  manifest.run_id = record.run_id;
  manifest.step = state.step;
  manifest.architecture = record.architecture;
  manifest.run = record.run;
  manifest.provenance = record.provenance;
  manifest.layout = layout_record(mesh.grid());
  manifest.training = {{"step", state.step},
                       {"position", state.position},
                       {"skipped", state.skipped},
                       {"updates", optimizer ? optimizer->updates().item<double>() : 0.0},
                       {"random", "Philox4x32-10, a function of (run.seed, stream, index): nothing to restore"}};
  if (!state.routers.empty()) manifest.training["routers"] = state.routers;
  writer.commit(std::move(manifest));
  return folder;
}

CheckpointBytes checkpoint_bytes(const Architecture& architecture, at::ScalarType compute) {
  CheckpointBytes bytes{0, 0};
  for (const ParameterSpec& spec : catalogue(architecture)) {
    const uint64_t count = elements(spec.shape);
    const bool rounds = compute != at::kFloat && !spec.always_fp32();
    const uint64_t weight = count * (rounds ? c10::elementSize(compute) : 4);
    bytes.step_zero += weight;
    bytes.full += weight + count * (rounds ? 12 : 8);
  }
  return bytes;
}

TrainingState restore_checkpoint(const CheckpointReader& reader, Weights& weights, Optimizer* optimizer) {
  const Unrecorded guard;
  const auto all = [](const Part&) { return true; };
  const auto master = [&](size_t index) { return weights.all()[index].parameter.master; };
  std::vector<Piece> values = pieces(weights, master, all);
  reader.fill(kWeightsFile, values);
  const auto& masters = reader.tensors(kMastersFile);
  std::vector<Piece> exact = pieces(weights, master, [&](const Part& part) { return masters.contains(part.spec.name); });
  reader.fill(kMastersFile, exact);
  weights.publish();

  const nlohmann::json& training = reader.manifest().training;
  TrainingState state;
  state.step = training.value("step", int64_t{0});
  state.position = training.value("position", int64_t{0});
  state.skipped = training.value("skipped", int64_t{0});
  state.routers = training.value("routers", nlohmann::json::object());
  if (optimizer && !reader.tensors(kFirstMomentsFile).empty()) {
    std::vector<Piece> first = pieces(weights, [&](size_t index) { return optimizer->exp_avg(index); }, all);
    std::vector<Piece> second = pieces(weights, [&](size_t index) { return optimizer->exp_avg_sq(index); }, all);
    reader.fill(kFirstMomentsFile, first);
    reader.fill(kSecondMomentsFile, second);
    optimizer->updates().fill_(training.value("updates", 0.0));
  }
  return state;
}

}  // namespace upcycle
