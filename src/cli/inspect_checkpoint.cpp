#include "cli/inspect_checkpoint.hpp"

#include <algorithm>
#include <fstream>
#include <iomanip>
#include <iostream>
#include <sstream>

#include "base/error.hpp"
#include "base/lines.hpp"
#include "checkpoint/digest.hpp"
#include "model/catalogue.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using nlohmann::ordered_json;

std::string size_in_words(double number) {
  const char* unit = "kMGTP";
  for (number /= 1000; number >= 999.95 && unit[1]; number /= 1000) ++unit;
  return text(std::fixed, std::setprecision(number < 9.9995 ? 3 : number < 99.995 ? 2 : 1), number, ' ', *unit, 'B');
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

ordered_json whole_description(const CheckpointReader& reader) {
  const Manifest& manifest = reader.manifest();
  const std::string where = (reader.folder() / kManifestFile).string();
  const Architecture architecture = architecture_from_hf(manifest.architecture, where);
  const ParameterCount parameters = count_parameters(architecture);
  ordered_json out = {{"checkpoint", reader.folder().string()},
                      {"schema_version", manifest.schema_version},
                      {"step", manifest.step},
                      {"run_id", manifest.run_id},
                      {"architecture", manifest.architecture},
                      {"parameters", {{"total", parameters.total}, {"active", parameters.active}}},
                      {"recipe", describe_recipe(manifest.provenance, architecture.is_moe())},
                      {"training", manifest.training},
                      {"layout", manifest.layout},
                      {"provenance", manifest.provenance},
                      {"run", manifest.run},
                      {"files", manifest.files},
                      {"tensors", ordered_json::object()}};
  for (const std::string& file : reader.tensor_files()) {
    ordered_json& list = out["tensors"][file] = ordered_json::object();
    for (const auto& [name, tensor] : reader.tensors(file))
      list[name] = {{"dtype", word_for(tensor.dtype)}, {"shape", tensor.shape}, {"checksum", checksum_of(reader, file, name)}};
  }
  out["digest"] = manifest.schema_version == 1 ? ordered_json() : ordered_json(digest_of_tensors(manifest.tensors));
  out["certificate"] = certificate_in(reader.folder());
  return out;
}

/// Where the weights came from, in one line.
std::string describe_source(const json& provenance) {
  if (!provenance.is_object() || !provenance.contains("source")) return "not recorded";
  const json& source = provenance["source"];
  if (!source.is_object()) return source.is_string() ? source.get<std::string>() : printable(source);
  return source.contains("path") && source["path"].is_string() ? source["path"].get<std::string>() : printable(source);
}

std::string describe_layout(const json& layout) {
  std::string out;
  for (const auto& [key, value] : layout.items()) {
    if (key != "ranks" && value != 1) out += text(out.empty() ? " (" : ", ", key, " ", printable(value));
  }
  return text(printable(layout.is_object() ? layout.value("ranks", json("an unknown number of")) : json("an unknown number of")), " ranks",
              out, out.empty() ? "" : ")");
}

std::string count_of(const json& numbers, const char* key) {
  return numbers.contains(key) && numbers[key].is_number() ? text(numbers[key].get<double>()) : "an unknown number of";
}

/// What training has done so far.
std::string describe_training(const Manifest& manifest) {
  const json& training = manifest.training;
  if (!training.is_object() || training.empty()) return "none";
  const bool moments = manifest.files.contains(kFirstMomentsFile);
  return text(count_of(training, "updates"), " updates of the weights, ", count_of(training, "skipped"), " steps skipped, ",
              moments ? "with" : "without", " the optimizer's moments",
              training.contains("routers") && training["routers"].is_object()
                  ? text(", biases or counts of ", training["routers"].size(), " routers") : "");
}

/// How far into the data.
std::string describe_position(const Manifest& manifest) {
  const json &training = manifest.training, &run = manifest.run;
  if (!training.is_object() || !training.contains("position") || !training["position"].is_number_integer()) return "nothing taken yet";
  const int64_t sequences = training["position"].get<int64_t>();
  const json length = run.is_object() && run.contains("train") && run["train"].is_object() ? run["train"].value("sequence", json()) : json();
  return text(sequences, " sequences taken",
              length.is_number_integer() ? text(" of ", length.get<int64_t>(), " tokens: ", sequences * length.get<int64_t>()) : "");
}

void print_tensors(const CheckpointReader& reader, const std::string& file, bool each) {
  const auto line = [&](const std::string& name, at::ScalarType dtype, const Shape& shape, const std::string& rest) {
    std::cout << "  " << std::left << std::setw(52) << name << ' ' << std::setw(9) << word_for(dtype) << describe(shape) << rest << "\n";
  };
  std::cout << "\n" << file << ": " << reader.tensors(file).size() << " tensors\n";
  if (each) {
    for (const auto& [name, tensor] : reader.tensors(file)) line(name, tensor.dtype, tensor.shape, "  " + checksum_of(reader, file, name));
    return;
  }
  for (const Group& group : groups(reader.tensors(file))) {
    line(group.name, group.dtype, group.shape, group.count > 1 ? text("  x ", group.count) : "");
  }
}

void print_checkpoint(const CheckpointReader& reader, const ordered_json& all, bool tensors) {
  const Manifest& manifest = reader.manifest();
  const Architecture a = architecture_from_hf(manifest.architecture, reader.folder().string());
  const auto line = [](const std::string& key, const std::string& value) {
    std::cout << std::left << std::setw(14) << key << value << "\n";
  };
  double size = 0;
  for (const auto& [file, bytes] : manifest.files.items()) size += bytes.get<double>();
  line("checkpoint", reader.folder().string());
  line("step", text(manifest.step, " of run ", manifest.run_id, ", schema version ", manifest.schema_version));
  line("size", text(size_in_words(size), " in ", manifest.files.size(), " files"));
  line("model",
       text(a.is_moe() ? "Qwen3-MoE" : "Qwen3", ", ", a.layers, " layers of width ", a.hidden,
            a.is_moe() ? text(", ", a.experts, " experts of width ", a.expert_ffn, ", ", a.top_k, " a token") : ""));
  line("parameters",
       text(all["parameters"]["total"].dump(), " total, ", all["parameters"]["active"].dump(), " active"));
  line("training", describe_training(manifest));
  line("data", describe_position(manifest));
  line("written by", describe_layout(manifest.layout));
  line("source", describe_source(manifest.provenance));
  line("recipe", describe_recipe(manifest.provenance, a.is_moe()));
  line("certificate", describe_certificate(all["certificate"]));
  if (all["digest"].is_string()) line("digest", all["digest"].get<std::string>());
  std::cout << "\nfiles\n";
  for (const auto& [file, bytes] : manifest.files.items()) {
    std::cout << "  " << std::left << std::setw(34) << file << std::right << std::setw(12)
              << size_in_words(bytes.get<double>()) << "\n";
  }
  for (const std::string& file : reader.tensor_files()) print_tensors(reader, file, tensors);
}

}  // namespace

fs::path find_checkpoint(const std::string& path) {
  std::vector<std::string> why;
  const auto checkpoint = newest_checkpoint(path, &why);
  if (!checkpoint) fail(path, ": neither a valid checkpoint nor a run that has one", listed(why));
  return *checkpoint;
}

void inspect_checkpoint(const fs::path& checkpoint, bool tensors, bool as_json) {
  const CheckpointReader reader(checkpoint);
  const ordered_json all = whole_description(reader);
  if (as_json) {
    std::cout << printable(all, 2) << "\n";
  } else {
    print_checkpoint(reader, all, tensors);
  }
}

std::string describe_recipe(const json& provenance, bool of_mixture) {
  if (!provenance.is_object() || !provenance.contains("recipe") || !provenance["recipe"].is_object())
    return of_mixture ? "not recorded: the experts were there before" : "none: a dense model";
  const json& recipe = provenance["recipe"];
  const auto number = [](const json& in, const char* key) {
    if (!in.is_object() || !in.contains(key)) return std::string("?");
    return in[key].is_number_float() ? text(in[key].get<double>()) : printable(in[key]);
  };
  const auto of = [&](const char* key) { return number(recipe, key); };
  const auto word = [&](const char* key) {
    return recipe.contains(key) && recipe[key].is_string() ? recipe[key].get<std::string>() : std::string("?");
  };
  const auto several = [&](const char* key, const char* one, const char* more) {
    return text(of(key), " ", of(key) == "1" ? one : more);
  };
  std::string out = several("copies", "copy", "copies");
  if (recipe.contains("source") && recipe["source"].is_object()) {
    out += text(" of each of ", number(recipe["source"], "experts"), " experts");
  } else {
    out += " x " + several("granularity", "shard", "shards");
  }
  if (recipe.contains("quotas")) out += " (of several models: " + printable(recipe["quotas"]) + ")";
  out += text(" = ", of("experts"), " experts, ", of("top_k"), " a token, ", word("exactness"), ", scaling ", word("scaling"));
  if (recipe.contains("factors")) {
    const json& factors = recipe["factors"];
    out += text(" (gate ", number(factors, "gate"), ", up ", number(factors, "up"), ", down ", number(factors, "down"), ")");
  }
  if (recipe.contains("permutation") && recipe["permutation"] != "identity") out += ", units in order \"" + word("permutation") + "\"";
  return out + text(", router logits std ", of("router_logit_std"), ", noise ", of("noise"), ", drop ", of("drop"), ", seed ", of("seed"));
}

std::string describe_certificate(const ordered_json& certificate) {
  if (!certificate.is_object()) return certificate.is_null() ? "none" : "unreadable";
  const auto word = [&](const char* key) {
    return certificate.contains(key) && certificate[key].is_string() ? certificate[key].get<std::string>() : "unknown";
  };
  return text(word("verdict"), " (expected: ", word("expected"), ")");
}

ordered_json certificate_in(const fs::path& checkpoint) {
  const fs::path path = checkpoint / "certificate.json";
  if (!fs::exists(path)) return {};
  ordered_json out = ordered_json::parse(std::ifstream(path), nullptr, false);
  return out.is_discarded() ? ordered_json("unreadable") : out;
}

std::string checksum_of(const CheckpointReader& reader, const std::string& file, const std::string& name) {
  const StoredTensor& tensor = reader.tensors(file).at(name);
  const std::vector<uint64_t> sums = reader.checksums(file, name);
  const TensorSpec spec{name, tensor.dtype, tensor.shape};
  return sums.empty() && elements(tensor.shape) > 0 ? "none" : digest_of(std::span(&spec, 1), sums);
}

const char* word_for(at::ScalarType dtype) {
  return dtype == at::kFloat ? "float32" : dtype == at::kBFloat16 ? "bfloat16" : "int64";
}

std::string with_stars(const std::string& name) {
  std::string out;
  std::istringstream parts(name);
  for (std::string part; std::getline(parts, part, '.');) {
    const bool number = part.find_first_not_of("0123456789") == std::string::npos;
    out += (out.empty() ? "" : ".") + (number ? "*" : part);
  }
  return out;
}

std::string printable(const ordered_json& value, int indent) {
  return value.dump(indent, ' ', false, ordered_json::error_handler_t::replace);
}

}  // namespace upcycle
