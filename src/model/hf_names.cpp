// N experts, fe expert width, h hidden
#include "model/hf_names.hpp"

#include <stdexcept>
#include <string_view>

namespace upcycle {

namespace {

struct ExpertRow {
  std::string_view ours;    ///< how the name of our stacked parameter ends, after "...mlp.experts"
  std::string_view fused;   ///< how the fused tensor's name ends
  int64_t part, parts;      ///< which of how many matrices in the fused one, side by side along dim 1
};

constexpr ExpertRow kExperts[] = {
    {".gate_proj.weight", ".gate_up_proj", 0, 2},
    {".up_proj.weight", ".gate_up_proj", 1, 2},
    {".down_proj.weight", ".down_proj", 0, 1},
};

const ExpertRow& row_of(const ParameterSpec& spec) {
  for (const ExpertRow& row : kExperts) {
    if (spec.name.ends_with(row.ours)) return row;
  }
  throw std::logic_error(spec.name + " is no matrix of experts");
}

}  // namespace

std::vector<HfTensor> hf_tensors(const ParameterSpec& spec, ExpertForm form) {
  if (spec.role != Role::expert) return {{spec.name, spec.shape, whole(spec.shape)}};
  const ExpertRow& row = row_of(spec);
  const std::string stem = spec.name.substr(0, spec.name.size() - row.ours.size());  // "model.layers.0.mlp.experts"
  const int64_t rows = spec.shape[1], columns = spec.shape[2];
  if (form == ExpertForm::fused) {
    return {{stem + std::string(row.fused), {spec.shape[0], rows * row.parts, columns}, whole(spec.shape), rows * row.part}};
  }
  std::vector<HfTensor> out;
  for (int64_t e = 0; e < spec.shape[0]; ++e) {
    out.push_back({stem + "." + std::to_string(e) + std::string(row.ours), {rows, columns}, {{e, 0, 0}, {1, rows, columns}}});
  }
  return out;
}

}  // namespace upcycle
