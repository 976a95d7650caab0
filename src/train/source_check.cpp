#include "train/source_check.hpp"

#include <ATen/ops/equal.h>

#include <algorithm>
#include <set>

#include "base/dtype.hpp"
#include "base/error.hpp"
#include "base/lines.hpp"
#include "checkpoint/writer.hpp"

namespace upcycle {

namespace {

constexpr size_t kShown = 40;   // of a model that is another one, thousands differ

[[noreturn]] void complain(const std::string& folder, const std::vector<std::string>& problems) {
  fail(folder, ": ", problems.size(), problems.size() == 1 ? " tensor is" : " tensors are", " not what config.json describes:",
       listed(problems, kShown));
}

/// In blocks of rows: neither matrix is ever copied whole.
bool same_rows(const SafetensorsReader& files, const std::string& a, const std::string& b) {
  constexpr int64_t kRows = 4096;
  const Shape& shape = files.entries().at(a).shape;
  for (int64_t row = 0; row < shape[0]; row += kRows) {
    const Box box{{row, 0}, {std::min(kRows, shape[0] - row), shape[1]}};
    if (!at::equal(files.read(a, box).to(at::kFloat), files.read(b, box).to(at::kFloat))) return false;
  }
  return true;
}

}  // namespace

ExpertForm expert_form(const ParameterSpec& spec, const SafetensorsReader& files) {
  if (spec.role != Role::expert) return ExpertForm::one_by_one;
  return files.contains(hf_tensors(spec, ExpertForm::fused).front().name) ? ExpertForm::fused : ExpertForm::one_by_one;
}

void check_tensors(const Architecture& architecture, const SafetensorsReader& files, const std::filesystem::path& folder) {
  // architecture.dtype is fp32 as soon as one tensor is, so the config's own word is read for the others.
  const at::ScalarType said = read_architecture(folder / "config.json").dtype;
  std::vector<std::string> problems;
  std::set<std::string> expected;
  const auto judge = [&](const std::string& name, const Shape& shape) {
    expected.insert(name);
    const auto found = files.entries().find(name);
    if (found == files.entries().end()) return problems.push_back("missing: " + name + " " + describe(shape));
    const SafetensorsEntry& entry = found->second;
    if (entry.shape != shape) problems.push_back("wrong shape: " + name + " is " + describe(entry.shape) + ", expected " + describe(shape));
    if (entry.dtype != said && entry.dtype != at::kFloat) {
      problems.push_back("wrong dtype: " + name + " is " + long_name(entry.dtype) + ", config.json says " + long_name(said));
    }
  };
  for (const ParameterSpec& spec : catalogue(architecture)) {
    for (const HfTensor& tensor : hf_tensors(spec, expert_form(spec, files))) {
      if (!expected.contains(tensor.name)) judge(tensor.name, tensor.shape);
    }
  }
  const std::string head = "lm_head.weight", embedding = "model.embed_tokens.weight";
  if (architecture.tied && files.contains(head)) {
    judge(head, {architecture.vocab, architecture.hidden});
    if (problems.empty() && !same_rows(files, head, embedding)) {
      problems.push_back("wrong values: " + head + " differs from " + embedding + ", but config.json says tie_word_embeddings = true");
    }
  }
  for (const auto& [name, entry] : files.entries()) {
    if (!expected.contains(name)) problems.push_back("surplus: " + name + " " + describe(entry.shape));
  }
  if (!problems.empty()) complain(folder.string(), problems);
}

void check_tensors(const Architecture& architecture, const CheckpointReader& checkpoint) {
  std::vector<std::string> problems;
  std::set<std::string> expected;
  const auto& stored = checkpoint.tensors(kWeightsFile);
  for (const ParameterSpec& spec : catalogue(architecture)) {
    expected.insert(spec.name);
    const auto found = stored.find(spec.name);
    if (found == stored.end()) {
      problems.push_back("missing: " + spec.name + " " + describe(spec.shape));
    } else if (found->second.shape != spec.shape) {
      problems.push_back("wrong shape: " + spec.name + " is " + describe(found->second.shape) + ", expected " + describe(spec.shape));
    }
  }
  for (const auto& [name, tensor] : stored) {
    if (!expected.contains(name)) problems.push_back("surplus: " + name + " " + describe(tensor.shape));
  }
  if (!problems.empty()) complain(checkpoint.folder().string(), problems);
}

}  // namespace upcycle
