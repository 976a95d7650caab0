#include "train/origin.hpp"

#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/text_file.hpp"

namespace upcycle {

std::optional<Recipe> recipe_of(const std::filesystem::path& checkpoint, const Manifest& manifest) {
  const std::string where = checkpoint.string();
  const Architecture architecture = architecture_from_hf(manifest.architecture, where);
  if (!architecture.is_moe() || !manifest.provenance.is_object() || !manifest.provenance.contains("recipe")) return std::nullopt;
  const std::string clusters = manifest.files.contains(kClustersFile) ? text_of(checkpoint / kClustersFile) : "";
  return while_doing(where, [&] { return recipe_from_json(manifest.provenance["recipe"], architecture, clusters); });
}

}  // namespace upcycle
