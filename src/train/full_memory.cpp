#include "train/full_memory.hpp"

#include <utility>
#include <vector>

#include "base/error.hpp"
#include "base/quantities.hpp"
#include "train/memory_plan.hpp"

namespace upcycle {
std::string memory_is_full(const Architecture& architecture, const RunConfig& run, const Layout& layout, int rank, int64_t available,
                           const std::string& why) {
  const RankMemory plan = rank_memory(architecture, run, layout, rank);
  std::string out = text("this GPU's memory is full (", gigabytes(available), "): ", why.substr(0, why.find('\n')), "\n  planned for this rank: ",
                         gigabytes(plan.total()), " = weights ", gigabytes(plan.weights), " + masters ", gigabytes(plan.masters), " + gradients ",
                         gigabytes(plan.gradients), " + moments ", gigabytes(plan.moments), " + activations ", gigabytes(plan.activations),
                         " + buffers ", gigabytes(plan.buffers), " + libraries ", gigabytes(plan.libraries));
  if (plan.total() < available) out += "\n  that is less than it has: experts far out of balance take more, and so does another program on this GPU";
  std::vector<std::pair<std::string, RunConfig>> smaller;
  for (const auto& [mode, name] : {std::pair{Recompute::selective, "selective"}, {Recompute::full, "full"}}) {
    if (mode <= run.train.recompute) continue;
    smaller.emplace_back(text("train.recompute = \"", name, "\""), run).second.train.recompute = mode;
  }
  if (run.train.micro_batch % 2 == 0) {
    smaller.emplace_back(text("train.micro_batch = ", run.train.micro_batch / 2), run).second.train.micro_batch /= 2;
  }
  for (const auto& [change, other] : smaller) {
    const int64_t total = rank_memory(architecture, other, layout, rank).total();
    out += text("\n  ", change, ": ", gigabytes(total), total <= available ? "" : ", still too much");
  }
  return out + "\n  more ranks hold less each: parallel.expert, .pipeline, .tensor, .context (upcycle plan RUN.toml shows what fits)";
}

}  // namespace upcycle
