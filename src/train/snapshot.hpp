#pragma once
#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "checkpoint/reader.hpp"
#include "checkpoint/writer.hpp"
#include "model/weights.hpp"
#include "parallel/mesh.hpp"
#include "train/optimizer.hpp"
#include "train/trainer.hpp"

namespace upcycle {

/// What every checkpoint of a run says of where it comes from; the same for all of them.
struct RunRecord {
  std::string run_id;
  nlohmann::json architecture;                 ///< Hugging Face's form
  nlohmann::json run;                          ///< the resolved run
  nlohmann::json provenance;
  std::map<std::string, std::string> texts;    ///< further files: config.json, run.toml, certificate.json, tokenizer/...
};

/// The manifest of a checkpoint of that state, without its layout: what all of a run's checkpoints say, and what this one does.
/// `updates`: of the optimizer.
Manifest manifest_of(const RunRecord&, const TrainingState&, double updates);

/// How [checkpoint] wants them written.
WriteOptions write_options(const CheckpointSection&);

/// **Collective.** Adds to `writer` all files of a checkpoint: weights in the compute dtype, masters of those that rounding changed, and,
/// with an optimizer, its moments. Of what several ranks hold each gives the writer all it has. Returns the manifest to commit. Throws
/// UserError on all ranks when the disk is full.
Manifest add_snapshot(CheckpointWriter& writer, const Mesh&, Weights&, Optimizer* optimizer, const TrainingState&, const RunRecord&);

/// Bytes of a checkpoint over all ranks.
struct CheckpointBytes {
  uint64_t step_zero;   ///< weights only, in the compute dtype
  uint64_t full;        ///< weights, masters, two moments
};
CheckpointBytes checkpoint_bytes(const Architecture&, at::ScalarType compute);

/// Fills the moments of all that this rank owns: `fill` gets a box of a parameter, whether it is of the second moment, and an fp32 CPU
/// tensor of the box's size. Each rank by itself; calls `alive` after each bucket.
using FillMoment = std::function<void(const ParameterSpec& spec, const Box& box, bool second, Tensor target)>;
void fill_moments(const Weights&, Optimizer&, const FillMoment& fill, const std::function<void()>& alive);

/// Fills masters and values (and moments, and the number of updates, where there is an optimizer and the checkpoint has them) from
/// this rank's boxes and what it owns of them, on whatever layout it was written. Each rank by itself.
TrainingState restore_checkpoint(const CheckpointReader&, Weights&, Optimizer* optimizer);

}  // namespace upcycle
