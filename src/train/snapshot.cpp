#include "train/snapshot.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/zeros.h>

#include "base/autograd.hpp"
#include "base/dtype.hpp"
#include "checkpoint/boxes.hpp"

namespace upcycle {
namespace {

// A box of one parameter that lies, with others, in a run of a bucket.
struct Slice {
  const Part* part;
  Box box;              ///< of the parameter
  int64_t begin;        ///< in the run, of the rows that hold it
  Shape rows;
  int64_t in_row;       ///< along the dim in which the weight's parts lie side by side
  /// Its view of `flat`, which holds the run.
  Tensor of(const Tensor& flat) const {
    return flat.narrow(0, begin, elements(rows)).view(rows).narrow(part->dim, in_row, box.size[static_cast<size_t>(part->dim)]);
  }
};

// All that `run` of a bucket holds, in a fixed order.
std::vector<Slice> slices(const Weights& weights, const Bucket& bucket, const Range& run) {
  std::vector<Slice> out;
  for (size_t i = 0; i < bucket.weights.size(); ++i) {
    const Weight& weight = weights.all()[bucket.weights[i]];
    const int64_t begin = std::max(run.begin, bucket.runs[i].begin), end = std::min(run.end, bucket.runs[i].end);
    if (begin >= end) continue;
    int64_t at = begin - run.begin;
    for (const Box& rows : boxes_of_run(weight.shape, begin - bucket.runs[i].begin, end - bucket.runs[i].begin)) {
      for (const Part& part : weight.parts) {
        const auto dim = static_cast<size_t>(part.dim);
        const int64_t first = std::max(rows.begin[dim], part.begin);
        const int64_t last = std::min(rows.begin[dim] + rows.size[dim], part.begin + part.box.size[dim]);
        if (first >= last) continue;
        Box box = shifted(rows, part.box.begin);
        box.begin[dim] = part.box.begin[dim] + first - part.begin;
        box.size[dim] = last - first;
        out.push_back({&part, box, at, rows.size, first - rows.begin[dim]});
      }
      at += elements(rows);
    }
  }
  return out;
}

Range whole_of(const Bucket& bucket) { return {0, bucket.size}; }

// What this rank owns of a tensor that holds the whole bucket, or just that.
Tensor own_of(const Bucket& bucket, const Tensor& flat) {
  return flat.numel() == bucket.own.size() ? flat : flat.narrow(0, bucket.own.begin, bucket.own.size());
}

using Wanted = std::function<bool(const Bucket&, const ParameterSpec&)>;

void append(std::vector<Piece>& pieces, const Weights& weights, const Bucket& bucket, const Range& run, const Tensor& flat, const Wanted& wanted) {
  for (const Slice& slice : slices(weights, bucket, run)) {
    const ParameterSpec& spec = slice.part->spec;
    if (wanted(bucket, spec)) pieces.push_back({spec.name, spec.shape, slice.box, slice.of(flat)});
  }
}

// Some value is not exactly its master. In small parts, up to the first such.
bool differ(const Tensor& values, const Tensor& masters) {
  constexpr int64_t kElements = int64_t{1} << 20;
  if (values.dim() == 0) return !at::equal(values.to(at::kFloat), masters);
  const int64_t rows = std::max<int64_t>(1, kElements / std::max<int64_t>(1, values.numel() / std::max<int64_t>(1, values.size(0))));
  for (int64_t row = 0; row < values.size(0); row += rows) {
    const int64_t size = std::min(rows, values.size(0) - row);
    if (!at::equal(values.narrow(0, row, size).to(at::kFloat), masters.narrow(0, row, size))) return true;
  }
  return false;
}

// The names of parameters whose value in the compute dtype is not exactly the master, on any rank.
std::set<std::string> rounded(const Weights& weights, const Communicator& world) {
  std::vector<std::string> names;
  for (const ParameterSpec& spec : catalogue(weights.architecture())) names.push_back(spec.name);
  Tensor flags = at::zeros({static_cast<int64_t>(names.size())}, at::kLong);
  for (const Bucket& bucket : weights.buckets()) {
    if (bucket.dtype == at::kFloat) continue;
    const Tensor values = own_of(bucket, bucket.values), masters = own_of(bucket, bucket.masters);
    for (const Slice& slice : slices(weights, bucket, bucket.own)) {
      const auto at = std::find(names.begin(), names.end(), slice.part->spec.name) - names.begin();
      if (flags[at].item<int64_t>() == 0 && differ(slice.of(values), slice.of(masters))) flags[at] = 1;
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

WriteOptions write_options(const CheckpointSection& settings) {
  WriteOptions options;
  for (const Transfer transfer : {Transfer::direct, Transfer::buffered, Transfer::independent}) {
    if (settings.transfer == name(transfer)) options.transfer = transfer;
  }
  options.file_bytes = static_cast<uint64_t>(settings.file_size * 1e9);
  return options;
}

Manifest manifest_of(const RunRecord& record, const TrainingState& state, double updates) {
  Manifest manifest;
  manifest.run_id = record.run_id;
  manifest.step = state.step;
  manifest.architecture = record.architecture;
  manifest.run = record.run;
  manifest.provenance = record.provenance;
  manifest.training = {{"step", state.step},
                       {"position", state.position},
                       {"skipped", state.skipped},
                       {"updates", updates},
                       {"random", "Philox4x32-10, a function of (run.seed, stream, index): nothing to restore"}};
  if (!state.routers.empty()) manifest.training["routers"] = state.routers;
  if (!state.losses.empty()) manifest.training["losses"] = state.losses;
  if (state.validation_loss) manifest.training["validation_loss"] = *state.validation_loss;
  return manifest;
}

Manifest add_snapshot(CheckpointWriter& writer, const Mesh& mesh, Weights& weights, Optimizer* optimizer, const TrainingState& state,
                      const RunRecord& record) {
  const Unrecorded guard;
  for (const Weight& weight : weights.all()) weight.parameter.arrived();
  const std::set<std::string> keep_master = rounded(weights, mesh.world());
  const Wanted all = [](const Bucket&, const ParameterSpec&) { return true; };   // replicas too: the writer takes each value once
  std::vector<Piece> values, masters, first, second;
  for (size_t index = 0; index < weights.buckets().size(); ++index) {
    const Bucket& bucket = weights.buckets()[index];
    append(values, weights, bucket, whole_of(bucket), bucket.values, all);
    if (bucket.dtype != at::kFloat) {
      append(masters, weights, bucket, bucket.own, own_of(bucket, bucket.masters),
             [&](const Bucket&, const ParameterSpec& spec) { return keep_master.contains(spec.name); });
    }
    if (!optimizer) continue;
    append(first, weights, bucket, bucket.own, optimizer->exp_avg(index), all);
    append(second, weights, bucket, bucket.own, optimizer->exp_avg_sq(index), all);
  }
  std::vector<CheckpointWriter::File> files = {{kWeightsFile, values}};
  if (!keep_master.empty()) files.push_back({kMastersFile, masters});
  if (optimizer) files.insert(files.end(), {{kFirstMomentsFile, first}, {kSecondMomentsFile, second}});
  writer.add(files);
  for (const auto& [name, content] : record.texts) writer.add_text(name, content);

  Manifest manifest = manifest_of(record, state, optimizer ? optimizer->updates().item<double>() : 0.0);
  manifest.layout = layout_record(mesh.grid());
  return manifest;
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

void fill_moments(const Weights& weights, Optimizer& optimizer, const FillMoment& fill, const std::function<void()>& alive) {
  const Unrecorded guard;
  for (size_t index = 0; index < weights.buckets().size(); ++index) {
    const Bucket& bucket = weights.buckets()[index];
    for (const bool second : {false, true}) {
      const Tensor& flat = second ? optimizer.exp_avg_sq(index) : optimizer.exp_avg(index);
      for (const Slice& slice : slices(weights, bucket, bucket.own)) {
        const Tensor host = at::empty(slice.box.size, at::kFloat);
        fill(slice.part->spec, slice.box, second, host);
        slice.of(flat).copy_(host);
      }
    }
    alive();
  }
}

TrainingState restore_checkpoint(const CheckpointReader& reader, Weights& weights, Optimizer* optimizer) {
  const Unrecorded guard;
  const auto& stored_masters = reader.tensors(kMastersFile);
  const Wanted all = [](const Bucket&, const ParameterSpec&) { return true; };
  const Wanted with_master = [&](const Bucket&, const ParameterSpec& spec) { return stored_masters.contains(spec.name); };
  const Wanted without = [&](const Bucket&, const ParameterSpec& spec) { return !stored_masters.contains(spec.name); };
  // Stored in the dtype of our values, and not rounded when they were: masters are the values, which need not be read twice.
  const auto& stored_values = reader.tensors(kWeightsFile);
  const Wanted of_values = [&](const Bucket& bucket, const ParameterSpec& spec) {
    const auto stored = stored_values.find(spec.name);
    return without(bucket, spec) && stored != stored_values.end() && stored->second.dtype == bucket.dtype;
  };
  const Wanted of_weights = [&](const Bucket& bucket, const ParameterSpec& spec) { return without(bucket, spec) && !of_values(bucket, spec); };
  const auto flat_of = [](const Bucket& bucket) -> const Tensor& { return bucket.dtype == at::kFloat ? bucket.values : bucket.masters; };
  const auto run_of = [&](const Bucket& bucket) { return flat_of(bucket).numel() == bucket.size ? whole_of(bucket) : bucket.own; };
  // Values are masters, rounded: the stored weights, or, where these were rounded and our own values are not, the stored masters.
  std::vector<Piece> values, masters;
  for (const Bucket& bucket : weights.buckets()) {
    const bool exact = bucket.dtype == at::kFloat;
    append(values, weights, bucket, whole_of(bucket), bucket.values, exact ? without : all);
    if (!exact) append(values, weights, bucket, run_of(bucket), flat_of(bucket), of_weights);
    append(masters, weights, bucket, run_of(bucket), flat_of(bucket), with_master);
  }
  reader.fill(kWeightsFile, values);
  reader.fill(kMastersFile, masters);
  for (const Bucket& bucket : weights.buckets()) {
    if (bucket.dtype == at::kFloat) continue;
    const Range run = run_of(bucket);
    const Tensor read = bucket.values.narrow(0, run.begin, run.size());
    for (const Slice& slice : slices(weights, bucket, run)) {
      if (of_values(bucket, slice.part->spec)) slice.of(flat_of(bucket)).copy_(slice.of(read));
    }
  }

  const nlohmann::json& training = reader.manifest().training;
  TrainingState state;
  state.step = training.value("step", int64_t{0});
  state.position = training.value("position", int64_t{0});
  state.skipped = training.value("skipped", int64_t{0});
  state.routers = training.value("routers", nlohmann::json::object());
  state.losses = training.value("losses", nlohmann::json::array());
  if (optimizer && !reader.tensors(kFirstMomentsFile).empty()) {
    std::vector<Piece> first, second;
    for (size_t index = 0; index < weights.buckets().size(); ++index) {
      const Bucket& bucket = weights.buckets()[index];
      append(first, weights, bucket, bucket.own, optimizer->exp_avg(index), all);
      append(second, weights, bucket, bucket.own, optimizer->exp_avg_sq(index), all);
    }
    reader.fill(kFirstMomentsFile, first);
    reader.fill(kSecondMomentsFile, second);
    optimizer->updates().fill_(training.value("updates", 0.0));
  }
  return state;
}

}  // namespace upcycle
