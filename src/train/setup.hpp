#pragma once
#include <filesystem>
#include <optional>
#include <vector>

#include "checkpoint/reader.hpp"
#include "config/run_config.hpp"
#include "data/sampler.hpp"
#include "train/dense_source.hpp"
#include "train/snapshot.hpp"
#include "train/target.hpp"
#include "upcycle/read_dense.hpp"

namespace upcycle {

/// Everything about a run that is known, and was checked, before anything is allocated or written.
struct Setup {
  std::filesystem::path directory;
  std::optional<CheckpointReader> resume;   ///< the newest valid checkpoint of the run directory
  std::optional<WeightSource> source;       ///< where the weights come from; empty when resuming or starting at random
  std::vector<WeightSource> further;        ///< more sources of the same shape
  Target target;                            ///< what is trained, and by which recipe it grows
  nlohmann::json routers;                   ///< what the routers of a source that is a checkpoint remember, see Balance::state
  std::optional<Sampler> train, validation;
  RunRecord record;
};

/// Boxes of the source, or of all sources. Valid as long as `setup`.
ReadDense reader_of(const Setup& setup);

/// Reads and checks all that the run names: directory, source, architecture, recipe, data, layout, free space; of a run that goes on,
/// also that it is the one of its newest checkpoint, less what `accept_changes` lets pass (resume.hpp). `ranks`: of the world. Each rank by
/// itself, but for the token ids, which the rank that `speaks` reads for all: call it inside Communicator::together. Throws UserError.
/// Writes nothing.
Setup prepare_run(const RunConfig&, int ranks, bool speaks, bool accept_changes = false);

/// The parts of prepare_run that know neither data nor layout, for a run that has no checkpoint yet: opens and checks [source], and
/// finds out what becomes of it (source, further, target, routers). `speaks`: this rank warns of damaged checkpoints. Throws UserError.
void open_sources(const RunConfig&, Setup&, bool speaks);
/// Then: what the checkpoints say of where they come from. A resumed run goes on with the record of its checkpoint.
void make_record(const RunConfig&, Setup&);

/// The validation stream of a run: data.validation, or the second share of data.train; the same sequences whatever the run's seeds. Throws UserError like Sampler's constructor.
Sampler open_validation(const RunConfig&, int64_t vocab);

/// The compute dtype of a precision.
at::ScalarType compute_dtype(Precision);

}  // namespace upcycle
