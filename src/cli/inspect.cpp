#include <algorithm>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "base/error.hpp"
#include "checkpoint/reader.hpp"
#include "cli/command.hpp"
#include "cli/inspect_data.hpp"
#include "data/summary.hpp"
#include "model/catalogue.hpp"
#include "parallel/mesh.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

const char* dtype_name(at::ScalarType dtype) {
  return dtype == at::kFloat ? "float32" : dtype == at::kBFloat16 ? "bfloat16" : "int64";
}

std::string bytes(double number) {
  const char* unit = "kMGTP";
  for (number /= 1000; number >= 999.95 && unit[1]; number /= 1000) ++unit;
  return text(std::fixed, std::setprecision(number < 9.9995 ? 3 : number < 99.995 ? 2 : 1), number, ' ', *unit, 'B');
}

/// "model.layers.17.mlp.down_proj.weight" -> "model.layers.*.mlp.down_proj.weight".
std::string with_stars(const std::string& name) {
  std::string out;
  std::istringstream parts(name);
  for (std::string part; std::getline(parts, part, '.');) {
    const bool number = part.find_first_not_of("0123456789") == std::string::npos;
    out += (out.empty() ? "" : ".") + (number ? "*" : part);
  }
  return out;
}

/// Tensors of one file that differ in a layer's number only, in the order in which they come first.
struct Group {
  std::string name;
  at::ScalarType dtype;
  Shape shape;
  int64_t count;
};
std::vector<Group> groups(const std::map<std::string, StoredTensor>& tensors) {
  std::vector<Group> out;
  for (const auto& [name, tensor] : tensors) {
    const Group group{with_stars(name), tensor.dtype, tensor.shape, 1};
    const auto same = [&](const Group& g) {
      return g.name == group.name && g.dtype == group.dtype && g.shape == group.shape;
    };
    const auto found = std::find_if(out.begin(), out.end(), same);
    found == out.end() ? out.push_back(group) : void(++found->count);
  }
  return out;
}

ordered_json describe_checkpoint(const CheckpointReader& reader) {
  const Manifest& manifest = reader.manifest();
  const std::string where = (reader.folder() / kManifestFile).string();
  const ParameterCount parameters = count_parameters(architecture_from_hf(manifest.architecture, where));
  ordered_json out = {{"checkpoint", reader.folder().string()},
                      {"schema_version", manifest.schema_version},
                      {"step", manifest.step},
                      {"run_id", manifest.run_id},
                      {"architecture", manifest.architecture},
                      {"parameters", {{"total", parameters.total}, {"active", parameters.active}}},
                      {"training", manifest.training},
                      {"layout", manifest.layout},
                      {"provenance", manifest.provenance},
                      {"run", manifest.run},
                      {"files", manifest.files},
                      {"tensors", ordered_json::object()}};
  for (const std::string& file : reader.tensor_files()) {
    ordered_json& list = out["tensors"][file] = ordered_json::object();
    for (const auto& [name, tensor] : reader.tensors(file))
      list[name] = {{"dtype", dtype_name(tensor.dtype)}, {"shape", tensor.shape}};
  }
  out["certificate"] = manifest.files.contains("certificate.json")
                           ? ordered_json::parse(std::ifstream(reader.folder() / "certificate.json"), nullptr, false)
                           : ordered_json();
  return out;
}

/// Where the weights came from, in one line.
std::string describe_source(const nlohmann::json& provenance) {
  if (!provenance.is_object() || !provenance.contains("source")) return "not recorded";
  const nlohmann::json& source = provenance["source"];
  if (!source.is_object()) return source.is_string() ? source.get<std::string>() : source.dump();
  return source.contains("path") && source["path"].is_string() ? source["path"].get<std::string>() : source.dump();
}

std::string describe_layout(const nlohmann::json& layout) {
  std::string out;
  for (const auto& [key, value] : layout.items()) {
    if (key != "ranks" && value != 1) out += text(out.empty() ? " (" : ", ", key, " ", value.dump());
  }
  return text(layout.value("ranks", nlohmann::json("an unknown number of")).dump(), " ranks", out,
              out.empty() ? "" : ")");
}

std::string describe_certificate(const ordered_json& certificate) {
  if (!certificate.is_object()) return certificate.is_null() ? "none" : "unreadable";
  const auto word = [&](const char* key) {
    return certificate.contains(key) && certificate[key].is_string() ? certificate[key].get<std::string>() : "unknown";
  };
  return text(word("verdict"), " (expected: ", word("expected"), ")");
}

void print(const CheckpointReader& reader, const ordered_json& all) {
  const Manifest& manifest = reader.manifest();
  const Architecture a = architecture_from_hf(manifest.architecture, reader.folder().string());
  const auto line = [](const std::string& key, const std::string& value) {
    std::cout << std::left << std::setw(14) << key << value << "\n";
  };
  line("checkpoint", reader.folder().string());
  line("step", text(manifest.step, " of run ", manifest.run_id, ", schema version ", manifest.schema_version));
  line("model",
       text(a.is_moe() ? "Qwen3-MoE" : "Qwen3", ", ", a.layers, " layers of width ", a.hidden,
            a.is_moe() ? text(", ", a.experts, " experts of width ", a.expert_ffn, ", ", a.top_k, " a token") : ""));
  line("parameters",
       text(all["parameters"]["total"].dump(), " total, ", all["parameters"]["active"].dump(), " active"));
  line("training", manifest.training.is_null() ? "none" : manifest.training.dump());
  line("written by", describe_layout(manifest.layout));
  line("source", describe_source(manifest.provenance));
  line("certificate", describe_certificate(all["certificate"]));
  std::cout << "\nfiles\n";
  for (const auto& [file, size] : manifest.files.items()) {
    std::cout << "  " << std::left << std::setw(34) << file << std::right << std::setw(12) << bytes(size.get<double>())
              << "\n";
  }
  for (const std::string& file : reader.tensor_files()) {
    std::cout << "\n" << file << ": " << reader.tensors(file).size() << " tensors\n";
    for (const Group& group : groups(reader.tensors(file))) {
      std::cout << "  " << std::left << std::setw(52) << group.name << std::setw(9) << dtype_name(group.dtype) << ' '
                << describe(group.shape) << (group.count > 1 ? text("  x ", group.count) : "") << "\n";
    }
  }
}

}  // namespace

int run_inspect(const Arguments& arguments) {
  if (world_rank() != 0) return kExitDone;
  const std::string& what = arguments.positional.at(0);
  const bool directory = fs::is_directory(what);   // a checkpoint is one; token files are two files
  const std::optional<std::string> prefix = data_prefix(what);
  if (directory && prefix) {
    fail(what, " is a directory, and ", *prefix, ".idx is there, too: say ", *prefix, ".idx for the token files, ", what,
         "/ for the checkpoint");
  }
  if (prefix) {
    inspect_data(*prefix, arguments.tokenizer, arguments.json);
    return kExitDone;
  }
  if (!directory) fail(what, ": neither the directory of a checkpoint or a run, nor token files (no ", what, ".idx)");
  if (arguments.tokenizer) fail("--tokenizer is for token files, but ", what, " is a directory");
  std::vector<std::string> why;
  const auto checkpoint = newest_checkpoint(what, &why);
  std::string reasons;
  for (const std::string& reason : why) reasons += "\n  " + reason;
  if (!checkpoint) fail(what, ": neither a valid checkpoint nor a run that has one", reasons);
  const CheckpointReader reader(*checkpoint);
  const ordered_json all = describe_checkpoint(reader);
  if (arguments.json) {
    std::cout << all.dump(2) << "\n";
  } else {
    print(reader, all);
  }
  return kExitDone;
}

}  // namespace upcycle
