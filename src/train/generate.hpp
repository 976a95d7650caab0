#pragma once
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <set>
#include <vector>

#include "model/stage.hpp"
#include "train/choose_token.hpp"
#include "train/start.hpp"

namespace upcycle {

/// The experts of one layer with experts that computed one position, best first, with their weights.
struct ChosenExperts {
  int64_t layer;
  std::vector<int64_t> experts;
  std::vector<double> weights;
};

/// A token that a model said, and where the position went from which it was predicted: that of the token before it.
struct GeneratedToken {
  int64_t id;
  std::vector<ChosenExperts> routing;   ///< empty unless asked for
};

struct GenerationRequest {
  std::vector<int64_t> prompt;   ///< not empty, and not longer than the model's positions
  int64_t tokens = 128;          ///< at most
  TokenChoice choice;
  uint64_t seed = 0;
  std::set<int64_t> ends;        ///< tokens that end a text; they are not told
  bool routing = false;
};

/// Why a text ends: with a token of `ends`; after `tokens` tokens; where the model's positions end.
enum class Ending { end_token, tokens, positions };
const char* name(Ending);

/// The degrees on which `world` ranks sample from a model: experts over as many ranks as divide both.
ParallelSection generation_layout(const Architecture&, int world);

/// A model that goes on with a text. Rank 0 has the text; the other ranks of its expert group lend their experts. What is said depends on
/// weights and request alone, not on the number of ranks.
class Generator {
 public:
  /// **Collective.** Each rank fills its own boxes, in `compute` dtype; ranks that are of no use hold nothing. `mesh` is laid out by
  /// generation_layout, prepared for `device`, and outlives this. `routers`: the biases of a checkpoint's routers, see Balance::state.
  Generator(const Architecture&, const Fill& fill, const nlohmann::json& routers, const Mesh& mesh, at::Device device,
            at::ScalarType compute);

  /// **Collective.** Goes on with the prompt; calls `tell` for each token, on rank 0, which alone looks at the request. Text number
  /// `sample` of a request has random numbers of its own. A prompt like that of the call before is not computed again.
  Ending generate(const GenerationRequest&, int64_t sample, const std::function<void(const GeneratedToken&)>& tell);

  /// The two steps of it. Forgets all text; there will be `room` tokens at most.
  void begin(int64_t room);
  /// **Collective** over the ranks that work. The text goes on with `tokens`; logits [V] of the last of them, on rank 0 (elsewhere
  /// nothing is looked at, and the result is undefined). What came before is not computed again.
  Tensor read(const std::vector<int64_t>& tokens);

  /// Whether this rank computes anything.
  bool works() const noexcept { return works_; }

 private:
  bool speaks() const noexcept { return mesh_.world().rank() == 0; }
  bool another_pass(bool more = false) const;
  Tensor pass(const std::vector<int64_t>& tokens);
  Tensor after_prompt(const GenerationRequest&, int64_t room);
  void look_at_routing(Block& block, const Tensor& h_TW);

  const Mesh& mesh_;
  Stage stage_;
  bool works_;
  at::Device device_;
  bool notes_routing_ = false;
  std::optional<KeyValues> before_;
  std::vector<ChosenExperts> routing_;   ///< of the last position

  // After the prompt of the last request.
  std::vector<int64_t> prompt_;
  Tensor prompt_logits_;
  std::vector<ChosenExperts> prompt_routing_;
};

}  // namespace upcycle
