#pragma once
#include <optional>
#include <string>
#include <vector>

#include "train/expert_health.hpp"
#include "train/snapshot.hpp"

namespace upcycle {

/// Where the experts of a run came from, by the record that its checkpoints carry. A run that started from the checkpoint of such a
/// run, as it was, has the same origin.
struct Origin {
  Recipe recipe;
  struct Source {
    std::filesystem::path path;
    nlohmann::json files;         ///< with their sizes, when step 0 was made
  };
  std::vector<Source> sources;    ///< one, or several of which copies are made
};
/// Empty: no recipe is known. Throws UserError for a recipe that is not whole.
std::optional<Origin> find_origin(const RunRecord&, const Architecture&);

/// Looks at the experts of a run again and again. The dense model may be moved away while the run goes on: then distances are left
/// out, and the log says so, once.
class ExpertWatch {
 public:
  /// The weights and the mesh outlive this one.
  ExpertWatch(const Weights&, const Mesh&, const RunRecord&);
  /// **Collective** over the world. As look_at_experts.
  std::vector<LayerHealth> look(const std::function<void()>& alive);

 private:
  const Weights& weights_;
  const Mesh& mesh_;
  std::optional<Origin> origin_;
  bool told_ = false;
};

}  // namespace upcycle
