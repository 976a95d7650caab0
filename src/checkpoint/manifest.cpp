#include "checkpoint/manifest.hpp"

#include <algorithm>
#include <cmath>
#include <iomanip>
#include <limits>

#include "base/error.hpp"
#include "base/mapped_file.hpp"
#include "checkpoint/digest.hpp"
#include "checkpoint/durable.hpp"
#include "checkpoint/safetensors_header.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
constexpr const char* kRemoved = ".removed";

/// A name that is none of a file below the checkpoint's directory.
bool leads_out(const std::string& name) {
  const fs::path path(name);
  return name.empty() || name.find('\0') != std::string::npos || path.is_absolute() ||
         std::find(path.begin(), path.end(), "..") != path.end();
}

std::string_view view_of(const MappedFile& file) { return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()}; }

/// Tensors have checksums of their own.
bool holds_text(const std::string& name) { return fs::path(name).extension() != ".h5"; }

/// Says why `checkpoint` is not valid; "" when it is.
std::string refusal(const fs::path& checkpoint) {
  try {
    const Manifest manifest = read_manifest(checkpoint);
    const std::string name = checkpoint.filename().string();
    if (const auto step = step_of(name); step && *step != manifest.step) {
      fail(checkpoint.string(), ": its manifest is of step ", manifest.step, ": it was renamed, or copied over another one");
    }
    check_complete(checkpoint, manifest);
    return "";
  } catch (const UserError& error) {
    return error.what();
  }
}

/// The step directories of `folder`, newest first.
std::vector<std::pair<int64_t, fs::path>> steps_of(const fs::path& folder) {
  std::vector<std::pair<int64_t, fs::path>> steps;
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(folder, error)) {
    if (const auto step = step_of(entry.path().filename().string()); step && entry.is_directory())
      steps.emplace_back(*step, entry.path());
  }
  std::sort(steps.rbegin(), steps.rend());
  return steps;
}

// Under another name first: a removal that is interrupted must not leave half a checkpoint.
void begin_removal(const fs::path& checkpoint) { rename_durably(checkpoint, checkpoint.string() + kRemoved); }

void finish_removals(const fs::path& checkpoints) {
  for (const auto& entry : fs::directory_iterator(checkpoints)) {
    if (entry.path().extension() == kRemoved && step_of(entry.path().stem().string())) fs::remove_all(entry.path());
  }
}

}  // namespace

json to_json(const Manifest& m) {
  json out = {{"schema_version", m.schema_version},
          {"run_id", m.run_id},
          {"step", m.step},
          {"architecture", m.architecture},
          {"run", m.run},
          {"provenance", m.provenance},
          {"training", m.training},
          {"layout", m.layout},
          {"files", m.files},
          {"tensors", m.tensors}};
  if (m.schema_version > 2) out["texts"] = m.texts;
  return out;
}

std::string to_text(const Manifest& manifest) {
  json out = to_json(manifest);
  out["digest"] = digest_of(out.dump());
  return out.dump(2) + "\n";
}

std::string part_name(const std::string& file, size_t i, size_t n) {
  const fs::path path = file;
  return text(path.stem().string(), '-', std::setfill('0'), std::setw(5), i, "-of-", std::setw(5), n, path.extension().string());
}

Manifest read_manifest(const fs::path& checkpoint) {
  const fs::path path = checkpoint / kManifestFile;
  if (!fs::exists(path)) fail(checkpoint.string(), ": not a checkpoint (it has no ", kManifestFile, ")");
  const MappedFile file(path);
  const json parsed = parse_json(view_of(file), path.string());
  if (!parsed.is_object() || !parsed.contains("schema_version") || !parsed["schema_version"].is_number_integer()) {
    fail(path.string(), ": has no 'schema_version': not a checkpoint of this program");
  }
  const json& version = parsed["schema_version"];
  if (!reads_schema(version.get<int64_t>())) {
    fail(path.string(), ": schema version ", version.dump(), ", but this program reads versions 1 to ", kSchemaVersion,
         " only: use the program that wrote it, or a newer one");
  }
  if (version != 1 || parsed.contains("digest")) {   // a flipped bit makes a 1 of a 3
    json signed_part = parsed;
    signed_part.erase("digest");
    if (parsed.value("digest", json()) != digest_of(signed_part.dump())) {
      fail(path.string(), ": is not what was written (its digest does not fit its content): the file was changed or damaged");
    }
  }
  const json step = parsed.value("step", json());
  if (!step.is_number_unsigned() || step.get<uint64_t>() > INT64_MAX) fail(path.string(), ": 'step' is ", step.dump(), ", no number of a step");
  try {
    return {.schema_version = version.get<int>(),
            .run_id = parsed.at("run_id"),
            .step = step.get<int64_t>(),
            .architecture = parsed.at("architecture"),
            .run = parsed.at("run"),
            .provenance = parsed.at("provenance"),
            .training = parsed.at("training"),
            .layout = parsed.at("layout"),
            .files = parsed.at("files"),
            .texts = version.get<int>() > 2 ? parsed.at("texts") : json::object(),
            .tensors = parsed.at("tensors")};
  } catch (const json::exception& error) {
    fail(path.string(), ": ", error.what());
  }
}

void check_complete(const fs::path& checkpoint, const Manifest& manifest) {
  if (!manifest.files.is_object()) fail((checkpoint / kManifestFile).string(), ": 'files' is not an object");
  if (!manifest.tensors.is_object()) fail((checkpoint / kManifestFile).string(), ": 'tensors' is not an object");
  if (!manifest.texts.is_object()) fail((checkpoint / kManifestFile).string(), ": 'texts' is not an object");
  for (const auto& [name, size] : manifest.files.items()) {
    if (leads_out(name)) fail((checkpoint / kManifestFile).string(), ": lists ", json(name).dump(), ", which is no file of this checkpoint");
    const fs::path file = checkpoint / name;
    if (!size.is_number_unsigned())
      fail((checkpoint / kManifestFile).string(), ": the size of '", name, "' is ", size.dump());
    std::error_code error, unknown;
    const uint64_t found = fs::file_size(file, error);
    if (error) fail(file.string(), ": ", fs::exists(file, unknown) ? "is not a regular file" : error.message(), ", but the manifest lists it");
    if (found != size.get<uint64_t>())
      fail(file.string(), ": has ", found, " bytes, but the manifest says ", size.dump());
    if (manifest.schema_version > 2 && holds_text(name) && manifest.texts.value(name, json()) != digest_of(view_of(MappedFile(file))))
      fail(file.string(), ": is not what was written (its digest does not fit its content): the file was changed or damaged");
  }
  const auto listed = [&](const json& part) { return part.is_string() && manifest.files.contains(part.get<std::string>()); };
  for (const auto& [kind, summary] : manifest.tensors.items()) {
    const json parts = summary.is_object() ? summary.value("parts", json::array()) : json();
    if (parts.is_array() && std::all_of(parts.begin(), parts.end(), listed)) continue;
    fail((checkpoint / kManifestFile).string(), ": what 'tensors' says of '", kind, "' is no summary, or has parts that 'files' does not list");
  }
}

std::string step_directory(int64_t step) { return text("step-", std::setfill('0'), std::setw(8), step); }

std::optional<int64_t> step_of(const std::string& name) {
  constexpr std::string_view prefix = "step-";
  if (!name.starts_with(prefix) || name.size() > prefix.size() + 18) return std::nullopt;
  const std::string digits = name.substr(prefix.size());
  if (digits.empty() || digits.find_first_not_of("0123456789") != std::string::npos) return std::nullopt;
  const int64_t step = std::stoll(digits);
  return step_directory(step) == name ? std::optional(step) : std::nullopt;
}

std::optional<fs::path> newest_checkpoint(const fs::path& path, std::vector<std::string>* why) {
  const auto valid = [&](const fs::path& checkpoint) {
    const std::string reason = refusal(checkpoint);
    if (!reason.empty() && why) why->push_back(reason);
    return reason.empty();
  };
  if (fs::exists(path / kManifestFile) || step_of(path.filename().string()))
    return valid(path) ? std::optional(path) : std::nullopt;
  for (const fs::path& folder : {path / "checkpoints", path}) {
    for (const auto& [step, checkpoint] : steps_of(folder)) {
      if (valid(checkpoint)) return checkpoint;
    }
  }
  return std::nullopt;
}

std::vector<fs::path> valid_checkpoints(const fs::path& checkpoints, int64_t before) {
  std::vector<fs::path> valid;
  for (const auto& [step, checkpoint] : steps_of(checkpoints)) {
    if (step < before && refusal(checkpoint).empty()) valid.push_back(checkpoint);
  }
  return valid;
}

std::optional<fs::path> best_checkpoint(const std::vector<fs::path>& checkpoints) {
  std::optional<fs::path> best;
  double lowest = std::numeric_limits<double>::infinity();
  for (const fs::path& checkpoint : checkpoints) {
    const json training = read_manifest(checkpoint).training;
    const json loss = training.is_object() ? training.value("validation_loss", json()) : json();
    if (!loss.is_number() || !(loss.get<double>() < lowest)) continue;
    best = checkpoint;
    lowest = loss;
  }
  return best;
}

std::vector<fs::path> remove_old(const fs::path& checkpoints, int64_t keep, int64_t keep_every, bool keep_best) {
  const std::vector<fs::path> valid = valid_checkpoints(checkpoints, std::numeric_limits<int64_t>::max());
  const std::optional<fs::path> best = keep_best ? best_checkpoint(valid) : std::nullopt;
  std::vector<fs::path> removed;
  for (size_t i = static_cast<size_t>(std::max<int64_t>(keep, 1)); i < valid.size(); ++i) {
    if (valid[i] == best || (keep_every > 0 && *step_of(valid[i].filename().string()) % keep_every == 0)) continue;
    begin_removal(valid[i]);
    removed.push_back(valid[i]);
  }
  finish_removals(checkpoints);
  return removed;
}

std::vector<fs::path> remove_after(const fs::path& checkpoints, int64_t step) {
  std::vector<fs::path> removed;
  for (const fs::path& checkpoint : valid_checkpoints(checkpoints, std::numeric_limits<int64_t>::max())) {
    if (*step_of(checkpoint.filename().string()) <= step) break;
    begin_removal(checkpoint);
    removed.push_back(checkpoint);
  }
  finish_removals(checkpoints);
  return removed;
}

fs::path set_aside(const fs::path& checkpoint) {
  fs::path aside = checkpoint;
  for (int n = 1; fs::exists(fs::symlink_status(aside)); ++n) aside = checkpoint.string() + ".damaged-" + std::to_string(n);
  rename_durably(checkpoint, aside);
  return aside;
}

}  // namespace upcycle
