#pragma once
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "base/mapped_file.hpp"
#include "base/tensor.hpp"
#include "checkpoint/reader.hpp"
#include "checkpoint/safetensors.hpp"
#include "config/architecture.hpp"
#include "model/catalogue.hpp"

namespace upcycle {

/// Where a run's weights come from: a Hugging Face directory (safetensors), or a checkpoint of ours (a step directory, or a run
/// directory: its newest valid step); dense or MoE. Names, shapes and boxes are the catalogue's, however the files stack experts.
/// Each rank opens it by itself and reads only what it asks for.
class WeightSource {
 public:
  /// Throws UserError naming the file: neither kind of directory, another architecture's config.json, damaged files.
  explicit WeightSource(const std::filesystem::path& path);

  const Architecture& architecture() const noexcept { return architecture_; }
  /// config.json as the source has it: keys that do not decide the function included.
  const nlohmann::json& config() const noexcept { return config_; }
  /// The directory that was opened: of a run directory, the step.
  const std::filesystem::path& folder() const noexcept { return folder_; }
  bool is_checkpoint() const noexcept { return checkpoint_.has_value(); }

  /// Holds the files against the catalogue. Throws one UserError that lists every missing, surplus, wrong-shape and wrong-dtype
  /// tensor. A tied model may carry lm_head.weight if it equals the embedding: it is compared.
  void check() const;

  /// A new CPU tensor with `box` of parameter `name`, in the dtype it is stored in (fp32 where a checkpoint has masters).
  Tensor read(const std::string& name, const Box& box) const;

  /// As read(), for one that goes through all of the source once: where the box lies in one mapped tensor the result is a view of it
  /// (never write to it; valid as long as the source), what follows in the file is fetched ahead, and what was looked at does not stay
  /// in this process's memory.
  Tensor look(const std::string& name, const Box& box) const;
  /// The dtype that read() gives of parameter `name`.
  at::ScalarType stored(const std::string& name) const;

  /// Whether there are moments of AdamW: in a checkpoint that training wrote.
  bool has_moments() const;
  /// As read(), of the first moment or the `second`. Only where there are some.
  Tensor read_moment(bool second, const std::string& name, const Box& box) const;
  /// Updates that the optimizer had done, for its bias correction.
  double updates() const;

  /// A part of a parameter, where it lies in the mapped files: nothing is read before it is touched, nothing is owned. Valid as
  /// long as the source. For Hugging Face directories.
  struct Mapped {
    Box box;
    Tensor view;   ///< box.size, stored dtype; never write to it
  };
  std::vector<Mapped> mapped(const ParameterSpec&) const;

  /// Where it came from: path, kind, files with their sizes, revision (of a hub snapshot), config; of a checkpoint also its own
  /// provenance.
  nlohmann::json provenance() const;
  /// Tokenizer and generation files that travel along; may be empty.
  std::vector<std::filesystem::path> tokenizer_files() const;

 private:
  void open_hugging_face(const std::filesystem::path&);
  void open_checkpoint(const std::filesystem::path&);
  const ParameterSpec& spec_of(const std::string& name, const Box& box) const;
  const char* file_of(const std::string& name) const;   ///< of a checkpoint: where the most exact values are
  Tensor read_stored(const char* file, const std::string& name, const Box& box) const;

  std::filesystem::path folder_;
  Architecture architecture_;
  nlohmann::json config_;
  std::map<std::string, ParameterSpec> specs_;
  std::optional<SafetensorsReader> safetensors_;
  std::vector<MappedFile> maps_;              ///< one per file of safetensors_
  mutable uint64_t looked_at_ = 0;            ///< bytes, since they were forgotten
  std::optional<CheckpointReader> checkpoint_;
};

/// Tokenizer and generation files in `directory` (a model's, or one named by [source] tokenizer).
/// Throws UserError when there are none.
std::vector<std::filesystem::path> tokenizer_files(const std::filesystem::path& directory);

/// Such files as a checkpoint carries them: "tokenizer/tokenizer.json" -> content. Throws UserError naming one that can't be read.
std::map<std::string, std::string> carried_tokenizer(const std::vector<std::filesystem::path>& files);

}  // namespace upcycle
