#include "cli/compare.hpp"

#include <algorithm>
#include <set>

#include "base/error.hpp"
#include "base/log.hpp"
#include "base/mapped_file.hpp"
#include "cli/inspect_checkpoint.hpp"

namespace upcycle {
namespace {

using nlohmann::json;

/// The keys in which `a` and `b` differ, down to what is no object.
void find_changes(const std::string& key, const json& a, const json& b, std::vector<Change>& out) {
  if (a == b) return;
  if (!a.is_object() || !b.is_object()) return out.push_back({key, a, b});
  const std::string in = key.empty() ? "" : key + ".";
  for (const auto& [name, value] : a.items()) {
    if (!b.contains(name)) {
      out.push_back({in + name, value, std::nullopt});
    } else {
      find_changes(in + name, value, b[name], out);
    }
  }
  for (const auto& [name, value] : b.items()) {
    if (!a.contains(name)) out.push_back({in + name, std::nullopt, value});
  }
}

std::vector<Change> changes_between(const json& a, const json& b, const std::string& key = "") {
  std::vector<Change> out;
  find_changes(key, a, b, out);
  return out;
}

/// Moves what a run is called from the settings to the names.
void set_names_aside(Comparison& all) {
  const auto is_name = [](const Change& change) { return change.key == "run.name" || change.key == "run.directory"; };
  std::copy_if(all.settings.begin(), all.settings.end(), std::back_inserter(all.names), is_name);
  std::erase_if(all.settings, is_name);
}

bool holds_tensors(const CheckpointReader& reader, const std::string& file) {
  const std::vector<std::string> files = reader.tensor_files();
  return std::find(files.begin(), files.end(), file) != files.end();
}

/// The small files: those of one only, and those of other bytes. Certificates hold sums in the order of their ranks: see their verdicts.
std::vector<std::string> other_small_files(const CheckpointReader& a, const CheckpointReader& b) {
  std::set<std::string> names;
  for (const CheckpointReader* reader : {&a, &b}) {
    for (const auto& [name, size] : reader->manifest().files.items()) {
      if (!holds_tensors(*reader, name) && name != "certificate.json") names.insert(name);
    }
  }
  std::vector<std::string> out;
  for (const std::string& name : names) {
    const bool here = a.manifest().files.contains(name), there = b.manifest().files.contains(name);
    if (here && there) {
      const MappedFile ours(a.folder() / name), theirs(b.folder() / name);
      if (!std::ranges::equal(ours.bytes(), theirs.bytes())) out.push_back(name + " differs");
    } else {
      out.push_back(text("only ", here ? "the first" : "the second", " has ", name));
    }
  }
  return out;
}

FileComparison compare_file(const CheckpointReader& a, const CheckpointReader& b, const std::string& file) {
  FileComparison out{file, {}, {}, {}, 0};
  const auto &ours = a.tensors(file), &theirs = b.tensors(file);
  for (const auto& [name, tensor] : ours) {
    const auto other = theirs.find(name);
    if (other == theirs.end()) {
      out.only_before.push_back(name);
      continue;
    }
    TensorChange change{name, tensor, other->second, {}};
    log::progress(text("comparing ", file, ": ", name));
    if (change.same_shape()) change.distance = tensor_distance(a, b, file, name);
    if (change.same_shape() && tensor.dtype == other->second.dtype && change.distance.differ == 0) {
      ++out.equal;
    } else {
      out.changed.push_back(change);
    }
  }
  for (const auto& [name, tensor] : theirs) {
    if (!ours.contains(name)) out.only_after.push_back(name);
  }
  return out;
}

}  // namespace

bool Comparison::same() const {
  return training.empty() && settings.empty() && architecture.empty() && provenance.empty() && other_files.empty() &&
         only_before.empty() && only_after.empty() && std::ranges::all_of(files, [](const FileComparison& f) { return f.same(); });
}

Comparison compare(const CheckpointReader& before, const CheckpointReader& after) {
  const Manifest &a = before.manifest(), &b = after.manifest();
  Comparison out;
  out.before = before.folder().string();
  out.after = after.folder().string();
  out.names = changes_between(a.run_id, b.run_id, "run_id");
  out.layout = changes_between(a.layout, b.layout);
  out.training = changes_between(a.step, b.step, "step");
  for (Change& change : changes_between(a.training, b.training)) {
    if (change.key != "step") out.training.push_back(std::move(change));
  }
  out.settings = changes_between(a.run, b.run);
  set_names_aside(out);
  out.architecture = changes_between(a.architecture, b.architecture);
  out.provenance = changes_between(a.provenance, b.provenance);
  const auto verdict = [](const CheckpointReader& reader) { return describe_certificate(certificate_in(reader.folder())); };
  if (verdict(before) != verdict(after)) out.provenance.push_back({"certificate.json", verdict(before), verdict(after)});
  out.other_files = other_small_files(before, after);
  for (const std::string& file : before.tensor_files()) {
    if (holds_tensors(after, file)) {
      out.files.push_back(compare_file(before, after, file));
    } else {
      out.only_before.push_back(file);
    }
  }
  for (const std::string& file : after.tensor_files()) {
    if (!holds_tensors(before, file)) out.only_after.push_back(file);
  }
  return out;
}

}  // namespace upcycle
