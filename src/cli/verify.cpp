#include "cli/verify.hpp"

#include <ATen/ops/from_blob.h>

#include <chrono>
#include <iomanip>
#include <iostream>
#include <optional>
#include <set>

#include "base/error.hpp"
#include "base/lines.hpp"
#include "base/log.hpp"
#include "base/mapped_file.hpp"
#include "checkpoint/blocks.hpp"
#include "checkpoint/digest.hpp"
#include "cli/command.hpp"
#include "cli/inspect_checkpoint.hpp"
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

/// One rank's share of the blocks of a checkpoint, in the order of files, tensors and blocks.
struct Share {
  std::vector<uint64_t> checksums;   ///< of all blocks of the checkpoint; 0 for those of other ranks
  Problems problems;
  int64_t values = 0, bytes = 0;
};

/// True unless some value is infinite or no number: then all bits of its exponent are set.
bool all_finite(const Tensor& values) {
  const auto none = [](const auto* bits, int64_t count, auto exponent) {
    bool found = false;
    for (int64_t i = 0; i < count; ++i) found |= (bits[i] & exponent) == exponent;
    return !found;
  };
  const void* data = values.const_data_ptr();
  if (values.scalar_type() == at::kBFloat16) return none(static_cast<const uint16_t*>(data), values.numel(), uint16_t{0x7f80});
  if (values.scalar_type() == at::kFloat) return none(static_cast<const uint32_t*>(data), values.numel(), uint32_t{0x7f800000});
  return true;
}

/// Reads those blocks that lie between two parts of `bytes` of the checkpoint's values: one run for every rank, so that disks read ahead.
/// What can't be read is a problem, and not the end.
Share check_share(const CheckpointReader& reader, const Communicator& world, int64_t bytes) {
  Share out;
  const int64_t begin = bytes / world.size() * world.rank();
  const int64_t end = world.rank() + 1 == world.size() ? bytes : bytes / world.size() * (world.rank() + 1);
  int64_t at = 0;
  for (const std::string& file : reader.tensor_files()) {
    for (const auto& [name, tensor] : reader.tensors(file)) {
      const auto width = static_cast<int64_t>(c10::elementSize(tensor.dtype));
      const Blocks blocks(tensor.shape, width);
      bool finite = true;
      for (int64_t number = 0; number < blocks.count(); ++number) {
        const bool mine = begin <= at && at < end;
        at += blocks.run(number).size() * width;
        out.checksums.push_back(0);
        if (!mine) continue;
        log::progress(text("reading ", file, ": ", name, ", ", (at - begin) * 100 / std::max<int64_t>(end - begin, 1), " %"));
        try {
          const StoredBlock block = reader.block(file, name, number);
          out.checksums.back() = block.checksum;
          out.values += block.values.numel();
          out.bytes += static_cast<int64_t>(block.values.nbytes());
          finite = finite && all_finite(block.values);
          if (!block.complaint.empty()) out.problems.push_back(block.complaint);
        } catch (const UserError& error) {
          out.problems.push_back(error.what());
        }
      }
      if (!finite) out.problems.push_back(text(file, ": tensor '", name, "' has values that are not finite"));
    }
  }
  return out;
}

/// **Collective.** Every block against its checksum, every value for being finite, and the digests of all that is there against the
/// manifest's.
void check_values(const CheckpointReader& reader, const Communicator& world, Verification& out) {
  int64_t bytes = 0;
  for (const std::string& file : reader.tensor_files()) {
    for (const auto& [name, tensor] : reader.tensors(file)) bytes += elements(tensor.shape) * static_cast<int64_t>(c10::elementSize(tensor.dtype));
  }
  const auto began = std::chrono::steady_clock::now();
  Share share = check_share(reader, world, bytes);
  // Each block is one rank's; the others have 0.
  Tensor sums = at::from_blob(share.checksums.data(), {static_cast<int64_t>(share.checksums.size())}, at::TensorOptions(at::kLong));
  world.all_reduce(sums);
  std::set<std::string> told;   // a tensor that several ranks read
  for (const std::string& of_rank : world.all_gather(printable(json(share.problems)))) {
    for (const json& problem : json::parse(of_rank)) {
      if (told.insert(problem.get<std::string>()).second) out.problems.push_back(problem.get<std::string>());
    }
  }
  out.values += world.all_reduce(share.values, Reduce::sum);
  out.bytes += world.all_reduce(share.bytes, Reduce::sum);
  out.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
  json tensors = json::object();
  size_t first = 0;
  for (const std::string& file : reader.tensor_files()) {
    std::vector<TensorSpec> specs;
    const size_t begin = first;
    for (const auto& [name, tensor] : reader.tensors(file)) {
      specs.push_back({name, tensor.dtype, tensor.shape});
      first += static_cast<size_t>(Blocks(tensor.shape, static_cast<int64_t>(c10::elementSize(tensor.dtype))).count());
    }
    const json& said = reader.manifest().tensors.value(file, json::object());
    tensors[file]["digest"] = digest_of(specs, std::span(share.checksums).subspan(begin, first - begin));
    if (said.contains("digest") && said["digest"] != tensors[file]["digest"]) {
      out.problems.push_back(text(file, ": its tensors or checksums are not those of the manifest (digest ", tensors[file]["digest"].dump(), ", the manifest says ",
                                  said["digest"].dump(), ")"));
    }
  }
  out.digest = digest_of_tensors(tensors);
}

/// `path` itself, or the newest valid checkpoint of the run that it is.
fs::path to_be_judged(const fs::path& path) {
  if (fs::exists(path / kManifestFile)) return path;
  std::vector<std::string> why;
  const auto newest = newest_checkpoint(path, &why);
  if (!newest) fail(path.string(), ": neither a checkpoint nor a run with a valid one", listed(why));
  return *newest;
}

void print_verdict(const fs::path& checkpoint, int64_t step, const Verification& result, bool as_json) {
  if (as_json) {
    json out = to_json(result);
    out["checkpoint"] = checkpoint.string();
    std::cout << printable(out, 2) << "\n";
    return;
  }
  for (const std::string& problem : result.problems) std::cout << problem << "\n";
  std::cout << checkpoint.string() << ": " << (result.problems.empty() ? "good" : "BAD") << ", step " << step << ", " << result.tensors
            << " tensors, " << result.values << " values (" << std::fixed << std::setprecision(3) << static_cast<double>(result.bytes) / 1e9 << " GB in "
            << result.seconds << " s), certificate " << result.certificate << ", digest " << result.digest << "\n";
}

}  // namespace

Verification verify(const CheckpointReader& reader, const Communicator& world) {
  Verification out;
  const Manifest& manifest = reader.manifest();
  const std::vector<ParameterSpec> specs =
      catalogue(architecture_from_hf(manifest.architecture, (reader.folder() / kManifestFile).string()));
  const std::set<std::string> known = {kWeightsFile, kMastersFile, kFirstMomentsFile, kSecondMomentsFile};
  if (const auto step = step_of(reader.folder().filename().string()); step && *step != manifest.step) {
    out.problems.push_back(text(reader.folder().string(), ": its manifest is of step ", manifest.step));
  }
  if (!manifest.files.contains(kWeightsFile)) out.problems.push_back(text(kWeightsFile, " is missing"));
  if (manifest.files.contains(kFirstMomentsFile) != manifest.files.contains(kSecondMomentsFile)) {
    out.problems.push_back(text("only one of ", kFirstMomentsFile, " and ", kSecondMomentsFile, " is there"));
  }
  out.certificate = certificate_of(reader, out.problems);
  for (const std::string& file : reader.tensor_files()) {
    if (!known.contains(file)) {
      out.problems.push_back(text(file, " is no file of a checkpoint"));
      continue;
    }
    check_tensors(reader, file, specs, file != kMastersFile, out.problems);
    check_dtypes(reader, file, specs, out.problems);
    out.tensors += static_cast<int64_t>(reader.tensors(file).size());
  }
  check_values(reader, world, out);
  return out;
}

json to_json(const Verification& v) {
  return {{"verdict", v.problems.empty() ? "good" : "bad"},
          {"problems", v.problems},
          {"certificate", v.certificate},
          {"digest", v.digest},
          {"tensors", v.tensors},
          {"values", v.values},
          {"bytes", v.bytes},
          {"seconds", v.seconds}};
}

int run_verify(const Arguments& arguments) {
  const Communicator world = Communicator::everyone();
  std::string found;
  int64_t step = 0;
  // Without a manifest and a model that this program knows there is nothing to judge: exit code 2.
  world.together([&] {
    if (world.rank() != 0) return;
    const fs::path checkpoint = to_be_judged(arguments.positional.at(0));
    const Manifest manifest = read_manifest(checkpoint);
    architecture_from_hf(manifest.architecture, (checkpoint / kManifestFile).string());
    found = checkpoint.string();
    step = manifest.step;
  });
  const fs::path checkpoint = world.broadcast(found, 0);
  Verification result;
  try {
    std::optional<CheckpointReader> reader;
    world.together([&] { reader.emplace(checkpoint); });
    result = verify(*reader, world);
  } catch (const UserError& error) {   // HDF5 can't read what it should, or files are missing: all ranks meet it
    result.problems.push_back(error.what());
  }
  if (world.rank() == 0) print_verdict(checkpoint, step, result, arguments.json);
  return result.problems.empty() ? kExitDone : kExitFault;
}

}  // namespace upcycle
