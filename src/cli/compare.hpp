#pragma once
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/reader.hpp"
#include "cli/tensor_distance.hpp"

namespace upcycle {

/// A value that two checkpoints don't have in common; nothing where one has no such key.
struct Change {
  std::string key;   ///< "optimizer.lr"
  std::optional<nlohmann::json> before, after;
};

/// One tensor of both whose dtype or values differ; with two shapes there is no distance.
struct TensorChange {
  std::string name;
  StoredTensor before, after;
  TensorDistance distance;
  bool same_shape() const { return before.shape == after.shape; }
};

/// What two files of the same name hold; everything but `equal` is a difference.
struct FileComparison {
  std::string file;
  std::vector<std::string> only_before, only_after;
  std::vector<TensorChange> changed;
  int64_t equal = 0;   ///< tensors that are the same, bit for bit
  bool same() const { return only_before.empty() && only_after.empty() && changed.empty(); }
};

/// What differs between two checkpoints.
struct Comparison {
  std::string before, after;                     ///< their directories
  std::vector<Change> names;                     ///< run_id, run.name, run.directory: what a run is called is no difference
  std::vector<Change> layout;                    ///< nothing depends on it: no difference, either
  std::vector<Change> training;                  ///< the step, the data position, ...
  std::vector<Change> settings;                  ///< keys of the resolved run
  std::vector<Change> architecture;
  std::vector<Change> provenance;                ///< source, recipe, the certificate's verdict
  std::vector<std::string> other_files;          ///< small files whose content differs, or that only one has, but certificate.json
  std::vector<std::string> only_before, only_after;   ///< files of tensors
  std::vector<FileComparison> files;             ///< of tensors, in both
  bool same() const;
};

/// Reads all tensors of both, once, in bounded memory. Throws UserError where something can't be read.
Comparison compare(const CheckpointReader& before, const CheckpointReader& after);

/// Prints it: tensors that differ in a layer's number only share a line unless `tensors`; or all of it as JSON.
void print(const Comparison&, bool tensors, bool json);

}  // namespace upcycle
