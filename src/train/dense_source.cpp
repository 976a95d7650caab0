#include "train/dense_source.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <fstream>

#include "base/dtype.hpp"
#include "base/error.hpp"
#include "base/lines.hpp"
#include "base/text_file.hpp"
#include "model/hf_names.hpp"
#include "train/source_check.hpp"

namespace upcycle {

namespace fs = std::filesystem;

namespace {

nlohmann::json read_json(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(path.string(), ": can't be read");
  try {
    return nlohmann::json::parse(file);
  } catch (const nlohmann::json::exception& error) {
    fail(path.string(), ": not JSON: ", error.what());
  }
}

std::vector<fs::path> present(const fs::path& directory) {
  static const char* const kNames[] = {"tokenizer.json",   "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                                       "vocab.json",       "merges.txt",            "chat_template.jinja",     "chat_template.json",
                                       "generation_config.json"};
  std::vector<fs::path> out;
  for (const char* name : kNames) {
    if (fs::is_regular_file(directory / name)) out.push_back(directory / name);
  }
  return out;
}

/// The part that two boxes of one tensor share; nothing when they do not meet.
std::optional<Box> common(const Box& a, const Box& b) {
  Box out = a;
  for (size_t d = 0; d < a.begin.size(); ++d) {
    const int64_t begin = std::max(a.begin[d], b.begin[d]), end = std::min(a.begin[d] + a.size[d], b.begin[d] + b.size[d]);
    if (begin >= end) return std::nullopt;
    out.begin[d] = begin, out.size[d] = end - begin;
  }
  return out;
}

Tensor part(Tensor x, const Box& of, const Box& wanted) {
  for (size_t d = 0; d < of.begin.size(); ++d) {
    x = x.narrow(static_cast<int64_t>(d), wanted.begin[d] - of.begin[d], wanted.size[d]);
  }
  return x;
}

/// The view of the part with the widest numbers: read() gives its dtype.
const Tensor& widest(const std::vector<WeightSource::Mapped>& parts) {
  return std::max_element(parts.begin(), parts.end(), [](const auto& a, const auto& b) {
           return a.view.element_size() < b.view.element_size();
         })->view;
}

/// The commit of a snapshot in the hub's cache: .../snapshots/<40 hex digits>.
std::string revision(const fs::path& folder) {
  const std::string name = folder.filename().string();
  const bool hex = name.size() == 40 && name.find_first_not_of("0123456789abcdef") == std::string::npos;
  return hex && folder.parent_path().filename() == "snapshots" ? name : "";
}

}  // namespace

WeightSource::WeightSource(const fs::path& path) {
  if (!fs::is_directory(path)) {
    fail(path.string(), ": not a directory; source.model names a Hugging Face directory or a checkpoint");
  }
  std::vector<std::string> refused;
  // A checkpoint has a config.json as well, so it is asked for first.
  if (const auto step = newest_checkpoint(path, &refused)) {
    open_checkpoint(*step);
  } else if (fs::exists(path / "config.json") && !fs::exists(path / kManifestFile)) {
    open_hugging_face(path);
  } else {
    const bool is_run = fs::exists(path / "run.toml") && (fs::is_directory(path / "checkpoints") || fs::exists(path / "metrics.jsonl"));
    if (refused.empty() && is_run) fail(path.string(), ": the directory of a run that has no checkpoint (yet)");
    fail(path.string(), ": neither a Hugging Face directory (no config.json) nor a valid checkpoint", listed(refused));
  }
  for (const ParameterSpec& spec : catalogue(architecture_)) specs_.emplace(spec.name, spec);
}

void WeightSource::open_hugging_face(const fs::path& path) {
  folder_ = path;
  architecture_ = read_architecture(path / "config.json");
  config_ = read_json(path / "config.json");
  safetensors_.emplace(path);
  for (const fs::path& file : safetensors_->files()) maps_.emplace_back(file);
  // A model saved again in fp32 often keeps the config of its bf16 days. What is stored counts.
  for (const auto& [name, entry] : safetensors_->entries()) {
    if (entry.dtype == at::kFloat) architecture_.dtype = at::kFloat;
  }
}

void WeightSource::open_checkpoint(const fs::path& path) {
  folder_ = path;
  checkpoint_.emplace(path);
  config_ = checkpoint_->manifest().architecture;
  architecture_ = architecture_from_hf(config_, (path / kManifestFile).string());
}

void WeightSource::check() const {
  if (checkpoint_) {
    check_tensors(architecture_, *checkpoint_);
  } else {
    check_tensors(architecture_, *safetensors_, folder_);
  }
}

std::vector<WeightSource::Mapped> WeightSource::mapped(const ParameterSpec& spec) const {
  if (!safetensors_) throw std::logic_error(folder_.string() + " is a checkpoint: its tensors are not mapped");
  const ExpertForm form = expert_form(spec, *safetensors_);
  std::vector<Mapped> out;
  for (const HfTensor& tensor : hf_tensors(spec, form)) {
    const auto found = safetensors_->entries().find(tensor.name);
    if (found == safetensors_->entries().end()) fail(folder_.string(), ": tensor '", tensor.name, "' is missing");
    const SafetensorsEntry& entry = found->second;
    if (entry.shape != tensor.shape) {
      fail(folder_.string(), ": tensor '", tensor.name, "' is ", describe(entry.shape), ", expected ", describe(tensor.shape));
    }
    const std::byte* const bytes = maps_[entry.file].bytes().data() + entry.begin;
    Tensor view = at::from_blob(const_cast<std::byte*>(bytes), entry.shape, at::TensorOptions().dtype(entry.dtype));
    if (spec.role == Role::expert) {
      view = form == ExpertForm::fused ? view.narrow(1, tensor.begin, spec.shape[1]) : view.unsqueeze(0);
    }
    out.push_back({tensor.ours, view});
  }
  return out;
}

const ParameterSpec& WeightSource::spec_of(const std::string& name, const Box& box) const {
  const auto spec = specs_.find(name);
  if (spec == specs_.end()) throw std::logic_error(name + " is no parameter of " + folder_.string());
  if (!inside(box, spec->second.shape)) throw std::logic_error(text(name, ": box ", describe(box), " of ", describe(spec->second.shape)));
  return spec->second;
}

Tensor WeightSource::read(const std::string& name, const Box& box) const {
  const ParameterSpec& spec = spec_of(name, box);
  if (checkpoint_) return read_stored(file_of(name), name, box);
  const std::vector<Mapped> pieces = mapped(spec);
  const Tensor out = at::empty(box.size, widest(pieces).options());
  for (const Mapped& piece : pieces) {
    if (const auto shared = common(piece.box, box)) part(out, box, *shared).copy_(part(piece.view, piece.box, *shared));
  }
  return out;
}

Tensor WeightSource::look(const std::string& name, const Box& box) const {
  const ParameterSpec& spec = spec_of(name, box);
  if (checkpoint_ || elements(box) == 0) return read(name, box);
  constexpr uint64_t kRemembered = 64 << 20, kAhead = 8 << 20;
  const std::vector<Mapped> pieces = mapped(spec);
  for (const Mapped& piece : pieces) {
    if (common(piece.box, box) != box || piece.view.scalar_type() != widest(pieces).scalar_type()) continue;
    const Tensor view = part(piece.view, piece.box, box);
    int64_t last = 0;
    for (int64_t d = 0; d < view.dim(); ++d) last += (view.size(d) - 1) * view.stride(d);
    const auto* const begin = static_cast<const std::byte*>(view.const_data_ptr());
    const uint64_t bytes = static_cast<uint64_t>(last + 1) * view.element_size();
    for (const MappedFile& map : maps_) {
      const std::span<const std::byte> file = map.bytes();
      if (begin < file.data() || begin >= file.data() + file.size()) continue;
      map.expect(static_cast<size_t>(begin - file.data()) + bytes, kAhead);
    }
    looked_at_ += bytes;
    if (looked_at_ > kRemembered) {
      for (const MappedFile& map : maps_) map.forget();
      looked_at_ = bytes;
    }
    return view;
  }
  return read(name, box);
}

at::ScalarType WeightSource::stored(const std::string& name) const {
  if (checkpoint_) return checkpoint_->tensors(file_of(name)).at(name).dtype;
  return widest(mapped(specs_.at(name))).scalar_type();
}

const char* WeightSource::file_of(const std::string& name) const {
  return checkpoint_->tensors(kMastersFile).contains(name) ? kMastersFile : kWeightsFile;
}

Tensor WeightSource::read_stored(const char* file, const std::string& name, const Box& box) const {
  const auto& stored = checkpoint_->tensors(file);
  const auto found = stored.find(name);
  if (found == stored.end()) fail((folder_ / file).string(), ": tensor '", name, "' is missing");
  Piece piece{name, found->second.shape, box, at::empty(box.size, at::TensorOptions().dtype(found->second.dtype))};
  checkpoint_->fill(file, {&piece, 1});
  return piece.local;
}

bool WeightSource::has_moments() const {
  return checkpoint_ && !checkpoint_->tensors(kFirstMomentsFile).empty() && !checkpoint_->tensors(kSecondMomentsFile).empty();
}

Tensor WeightSource::read_moment(bool second, const std::string& name, const Box& box) const {
  if (!has_moments()) throw std::logic_error(folder_.string() + " has no moments");
  return read_stored(second ? kSecondMomentsFile : kFirstMomentsFile, name, box);
}

double WeightSource::updates() const { return checkpoint_ ? checkpoint_->manifest().training.value("updates", 0.0) : 0.0; }

nlohmann::json WeightSource::provenance() const {
  nlohmann::json out = {{"path", fs::absolute(folder_).lexically_normal().string()}, {"config", config_}};
  if (checkpoint_) {
    const Manifest& manifest = checkpoint_->manifest();
    out["kind"] = "checkpoint";
    out["run_id"] = manifest.run_id;
    out["step"] = manifest.step;
    out["files"] = manifest.files;
    out["provenance"] = manifest.provenance;
    return out;
  }
  out["kind"] = "huggingface";
  out["files"] = nlohmann::json::object();
  for (const fs::path& file : safetensors_->files()) out["files"][file.filename().string()] = fs::file_size(file);
  if (const std::string commit = revision(fs::absolute(folder_).lexically_normal()); !commit.empty()) out["revision"] = commit;
  return out;
}

std::vector<fs::path> WeightSource::tokenizer_files() const { return present(checkpoint_ ? folder_ / "tokenizer" : folder_); }

std::vector<fs::path> tokenizer_files(const fs::path& directory) {
  std::vector<fs::path> out = present(directory);
  if (out.empty()) fail("source.tokenizer = ", directory.string(), ": no tokenizer files there (tokenizer.json, tokenizer_config.json, ...)");
  return out;
}

std::map<std::string, std::string> carried_tokenizer(const std::vector<fs::path>& files) {
  std::map<std::string, std::string> out;
  for (const fs::path& path : files) out["tokenizer/" + path.filename().string()] = text_of(path);
  return out;
}

}  // namespace upcycle
