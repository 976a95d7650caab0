#include "train/expert_watch.hpp"

#include <memory>

#include "base/error.hpp"
#include "base/log.hpp"
#include "train/dense_source.hpp"

namespace upcycle {
namespace {

using Record = nlohmann::json;

Record member(const Record& object, const char* key) { return object.is_object() ? object.value(key, Record()) : Record(); }

// The record in which the recipe was made: a checkpoint's, where the run took its mixture as it was.
Record where_it_grew(Record provenance) {
  for (;;) {
    const Record before = member(member(provenance, "source"), "provenance"), recipe = member(provenance, "recipe");
    if (!recipe.is_null() && recipe != member(before, "recipe")) return provenance;
    if (before.is_null()) return Record();
    provenance = before;
  }
}

// A source of the recipe. Opened anew for each look: files that were replaced since step 0 are noticed, and none are mapped while the
// model trains.
ReadDense::One reader(const Origin::Source& source) {
  auto opened = std::make_shared<std::optional<WeightSource>>();
  return [&source, opened](const std::string& name, const Box& box) {
    if (!*opened) {
      opened->emplace(source.path);
      if ((*opened)->provenance()["files"] != source.files) fail(source.path.string(), ": these are not the files of step 0 any more");
    }
    return (*opened)->read(name, box);
  };
}

}  // namespace

std::optional<Origin> find_origin(const RunRecord& record, const Architecture& architecture) {
  const Record grew = where_it_grew(record.provenance);
  if (grew.is_null() || !architecture.is_moe()) return std::nullopt;
  const auto clusters = record.texts.find(kClustersFile);
  Origin origin{recipe_from_json(grew["recipe"], architecture, clusters == record.texts.end() ? "" : clusters->second), {}};
  const Record source = member(grew, "source"), several = member(source, "models");
  for (const Record& one : several.is_array() ? several : Record::array({source})) {
    if (!member(one, "path").is_string()) return std::nullopt;
    origin.sources.push_back({one["path"].get<std::string>(), member(one, "files")});
  }
  return origin;
}

ExpertWatch::ExpertWatch(const Weights& weights, const Mesh& mesh, const RunRecord& record)
    : weights_(weights), mesh_(mesh) {
  try {
    origin_ = find_origin(record, weights.architecture());
  } catch (const std::exception& error) {   // no reason not to train
    if (mesh.world().rank() == 0) log::warning(text("what the experts grew out of is not known: ", error.what()));
  }
}

std::vector<LayerHealth> ExpertWatch::look(const std::function<void()>& alive) {
  if (!origin_) return look_at_experts(weights_, mesh_, nullptr, nullptr, alive).layers;
  std::vector<ReadDense::One> each;
  for (const Origin::Source& source : origin_->sources) each.push_back(reader(source));
  const ReadDense read(std::move(each));
  ExpertHealth health = look_at_experts(weights_, mesh_, &origin_->recipe, &read, alive);
  if (!health.trouble.empty() && !told_ && mesh_.world().rank() == 0) {
    log::warning("the experts' distance to their source is left out of metrics.jsonl: " + health.trouble);
    told_ = true;
  }
  return std::move(health.layers);
}

}  // namespace upcycle
