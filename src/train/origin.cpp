#include "train/origin.hpp"

#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "base/error.hpp"

namespace upcycle {

std::optional<Recipe> recipe_of(const std::filesystem::path& checkpoint, const Manifest& manifest) {
  const std::string where = checkpoint.string();
  const Architecture architecture = architecture_from_hf(manifest.architecture, where);
  if (!architecture.is_moe() || !manifest.provenance.is_object() || !manifest.provenance.contains("recipe")) return std::nullopt;
  std::string clusters;
  if (manifest.files.contains(kClustersFile)) {
    std::ifstream file(checkpoint / kClustersFile, std::ios::binary);
    clusters.assign(std::istreambuf_iterator<char>(file), {});
  }
  return while_doing(where, [&] { return recipe_from_json(manifest.provenance["recipe"], architecture, clusters); });
}

}  // namespace upcycle
