#include "train/run_changes.hpp"

#include <nlohmann/json.hpp>
#include <set>

#include "base/error.hpp"
#include "config/fields.hpp"
#include "train/learning_rate.hpp"

namespace upcycle {
namespace {

bool changes_nothing_computed(const Field& field) {
  static const std::set<std::string> kSections = {"parallel", "checkpoint", "validate", "log"};
  static const std::set<std::string> kKeys = {
      "run.name", "run.directory", "run.timeout", "run.transport", "run.device", "run.share_gpu", "run.signal",
      "source.architecture", "source.tokenizer",   // what is in these files is compared
      "moe.dispatcher", "moe.max_parameters", "upcycle.certify", "upcycle.certify_tokens",
      "train.micro_batch", "train.recompute", "train.deterministic", "train.nan_policy", "train.nan_limit", "train.rollbacks",
      "train.check_replicas",
      "balance.pad_to_capacity", "data.epochs"};
  return kSections.contains(field.section()) || kKeys.contains(field.key);
}

// The first step done whose learning rate another length would have changed; 0: none.
int64_t first_other_rate(const OptimizerSection& optimizer, int64_t steps, int64_t other_steps, int64_t steps_done) {
  for (int64_t step = 1; step <= steps_done; ++step) {
    if (learning_rate(optimizer, steps, step) != learning_rate(optimizer, other_steps, step)) return step;
  }
  return 0;
}

}  // namespace

std::string line_of(const RunChange& change) {
  return text(change.key, ": ", change.there, " there, ", change.here, " here", change.why.empty() ? "" : " (" + change.why + ")");
}

std::vector<RunChange> run_changes(const RunConfig& there, const RunConfig& here) {
  RunConfig a = there, b = here;
  const std::vector<Field> before = describe(a), now = describe(b);
  std::vector<RunChange> changes;
  for (size_t i = 0; i < now.size(); ++i) {
    if (changes_nothing_computed(now[i])) continue;
    const nlohmann::json was = before[i].write(), is = now[i].write();
    if (was != is) changes.push_back({now[i].key, was.dump(), is.dump(), ""});
  }
  return changes;
}

std::vector<RunChange> run_changes(const RunConfig& there, const RunConfig& here, int64_t steps_done) {
  std::vector<RunChange> changes = run_changes(there, here);
  for (auto change = changes.begin(); change != changes.end(); ++change) {
    if (change->key != "train.steps") continue;
    const int64_t other = first_other_rate(there.optimizer, there.train.steps, here.train.steps, steps_done);
    if (other == 0) {
      changes.erase(change);
    } else {
      change->why = text("the learning rate falls otherwise then: already that of step ", other, " would have been another");
    }
    break;
  }
  return changes;
}

}  // namespace upcycle
