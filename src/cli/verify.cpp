#include "cli/verify.hpp"

#include <ATen/ops/isfinite.h>

#include <iostream>
#include <set>

#include "base/error.hpp"
#include "base/log.hpp"
#include "base/mapped_file.hpp"
#include "checkpoint/digest.hpp"
#include "cli/command.hpp"
#include "model/catalogue.hpp"
#include "parallel/mesh.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using Problems = std::vector<std::string>;

/// A file of one tensor for each parameter: names and shapes are the catalogue's; `all`: none may be missing.
void check_tensors(const CheckpointReader& reader, const std::string& file, const std::vector<ParameterSpec>& specs,
                   bool all, Problems& problems) {
  const auto& tensors = reader.tensors(file);
  std::set<std::string> surplus;
  int64_t bytes = 0;
  for (const auto& [name, tensor] : tensors) {
    surplus.insert(name);
    bytes += elements(tensor.shape) * static_cast<int64_t>(c10::elementSize(tensor.dtype));
  }
  for (const ParameterSpec& spec : specs) {
    const auto found = tensors.find(spec.name);
    if (found == tensors.end()) {
      if (all) problems.push_back(text(file, ": tensor '", spec.name, "' is missing"));
      continue;
    }
    surplus.erase(spec.name);
    if (found->second.shape != spec.shape) {
      problems.push_back(text(file, ": tensor '", spec.name, "' has shape ", describe(found->second.shape),
                              ", its architecture says ", describe(spec.shape)));
    }
  }
  for (const std::string& name : surplus)
    problems.push_back(text(file, ": tensor '", name, "' belongs to no parameter of its architecture"));
  const json expected = {{"count", tensors.size()}, {"bytes", bytes}};
  json said = reader.manifest().tensors.value(file, json::object());
  for (const char* other : {"digest", "parts"}) said.erase(other);
  if (said != expected) problems.push_back(text(file, ": holds ", expected.dump(), ", but the manifest says ", said.dump()));
}

/// Weights: float32 or bfloat16, routers float32. Everything else: float32.
void check_dtypes(const CheckpointReader& reader, const std::string& file, const std::vector<ParameterSpec>& specs,
                  Problems& problems) {
  const auto& tensors = reader.tensors(file);
  for (const ParameterSpec& spec : specs) {
    const auto found = tensors.find(spec.name);
    if (found == tensors.end() || found->second.dtype == at::kFloat) continue;
    const bool may_be_bfloat16 = file == kWeightsFile && !spec.always_fp32();
    if (may_be_bfloat16 && found->second.dtype == at::kBFloat16) continue;
    problems.push_back(text(file, ": tensor '", spec.name, "' is ", c10::toString(found->second.dtype), ", not Float",
                            may_be_bfloat16 ? " or BFloat16" : ""));
  }
}

std::string certificate_of(const CheckpointReader& reader, Problems& problems) {
  const Manifest& manifest = reader.manifest();
  if (!manifest.files.contains("certificate.json")) return "none";
  const fs::path path = reader.folder() / "certificate.json";
  const MappedFile file(path);
  const auto* begin = reinterpret_cast<const char*>(file.bytes().data());
  const json certificate = json::parse(begin, begin + file.bytes().size(), nullptr, false);
  if (!certificate.is_object() || !certificate.contains("verdict") || !certificate["verdict"].is_string()) {
    problems.push_back(text(path.string(), ": has no verdict"));
    return "failed";
  }
  if (certificate["verdict"] == "passed") return "passed";
  problems.push_back(text("the certificate failed: ", certificate.value("objections", json::array()).dump()));
  return "failed";
}

/// Every block against its checksum, every value for being finite, and the digests of all that is there against the manifest's.
void check_values(const CheckpointReader& reader, Verification& out) {
  json tensors = json::object();
  for (const std::string& file : reader.tensor_files()) {
    std::vector<TensorSpec> specs;
    std::vector<uint64_t> checksums;
    for (const auto& [name, tensor] : reader.tensors(file)) {
      log::progress(text("reading ", file, ": ", name));
      specs.push_back({name, tensor.dtype, tensor.shape});
      bool finite = true;
      for (int64_t number = 0; number < reader.blocks(file, name); ++number) {
        const StoredBlock block = reader.block(file, name, number);
        checksums.push_back(block.checksum);
        out.values += block.values.numel();
        finite = finite && at::isfinite(block.values).all().item<bool>();
        if (!block.complaint.empty()) out.problems.push_back(block.complaint);
      }
      if (!finite) out.problems.push_back(text(file, ": tensor '", name, "' has values that are not finite"));
    }
    const json& said = reader.manifest().tensors.value(file, json::object());
    tensors[file]["digest"] = digest_of(specs, checksums);
    if (said.contains("digest") && said["digest"] != tensors[file]["digest"]) {
      out.problems.push_back(text(file, ": its tensors or checksums are not those of the manifest (digest ", tensors[file]["digest"].dump(), ", the manifest says ",
                                  said["digest"].dump(), ")"));
    }
  }
  out.digest = digest_of_tensors(tensors);
}

}  // namespace

Verification verify(const CheckpointReader& reader) {
  Verification out;
  const Manifest& manifest = reader.manifest();
  const std::vector<ParameterSpec> specs =
      catalogue(architecture_from_hf(manifest.architecture, (reader.folder() / kManifestFile).string()));
  const std::set<std::string> known = {kWeightsFile, kMastersFile, kFirstMomentsFile, kSecondMomentsFile};
  if (!manifest.files.contains(kWeightsFile)) out.problems.push_back(text(kWeightsFile, " is missing"));
  if (manifest.files.contains(kFirstMomentsFile) != manifest.files.contains(kSecondMomentsFile)) {
    out.problems.push_back(text("only one of ", kFirstMomentsFile, " and ", kSecondMomentsFile, " is there"));
  }
  out.certificate = certificate_of(reader, out.problems);
  try {
    for (const std::string& file : reader.tensor_files()) {
      if (!known.contains(file)) {
        out.problems.push_back(text(file, " is no file of a checkpoint"));
        continue;
      }
      check_tensors(reader, file, specs, file != kMastersFile, out.problems);
      check_dtypes(reader, file, specs, out.problems);
      out.tensors += static_cast<int64_t>(reader.tensors(file).size());
    }
    check_values(reader, out);
  } catch (const UserError& error) {  // HDF5 can't read what it should
    out.problems.push_back(error.what());
  }
  return out;
}

json to_json(const Verification& v) {
  return {{"verdict", v.problems.empty() ? "good" : "bad"},
          {"problems", v.problems},
          {"certificate", v.certificate},
          {"digest", v.digest},
          {"tensors", v.tensors},
          {"values", v.values}};
}

int run_verify(const Arguments& arguments) {
  if (world_rank() != 0) return kExitDone;  // reading twice proves nothing
  const fs::path path = arguments.positional.at(0);
  std::vector<std::string> why;
  fs::path checkpoint = path;
  if (!fs::exists(path / kManifestFile)) {  // no checkpoint itself: a run's
    const auto newest = newest_checkpoint(path, &why);
    std::string reasons;
    for (const std::string& reason : why) reasons += "\n  " + reason;
    if (!newest) fail(path.string(), ": neither a checkpoint nor a run with a valid one", reasons);
    checkpoint = *newest;
  }
  Verification result;
  // Without a manifest and a model that this program knows there is nothing to judge: exit code 2.
  const Manifest manifest = read_manifest(checkpoint);
  architecture_from_hf(manifest.architecture, (checkpoint / kManifestFile).string());
  try {
    check_complete(checkpoint, manifest);
    result = verify(CheckpointReader(checkpoint));
  } catch (const UserError& error) {
    result.problems.push_back(error.what());
  }
  if (arguments.json) {
    json out = to_json(result);
    out["checkpoint"] = checkpoint.string();
    std::cout << out.dump(2) << "\n";
  } else {
    for (const std::string& problem : result.problems) std::cout << problem << "\n";
    std::cout << checkpoint.string() << ": " << (result.problems.empty() ? "good" : "BAD") << ", step " << manifest.step
              << ", " << result.tensors << " tensors, " << result.values << " values, certificate "
              << result.certificate << ", digest " << result.digest << "\n";
  }
  return result.problems.empty() ? kExitDone : kExitFault;
}

}  // namespace upcycle
