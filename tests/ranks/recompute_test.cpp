// Layers computed again with collectives inside: the same bits as without, whatever axes are on.
#include "base/error.hpp"
#include "support/stage_pass.hpp"

namespace upcycle {
namespace {

TEST(RecomputeOnRanks, SameBitsOnEveryAxis) {
  for (const ParallelSection& degrees : std::vector<ParallelSection>{{.tensor = world_size()},
                                                                     {.expert = world_size()},
                                                                     {.expert_tensor = world_size()},
                                                                     {.tensor = 2, .expert = world_size()},
                                                                     {.expert = world_size() / 2, .expert_tensor = 2}}) {
    for (const auto& [dispatcher, factor] : {std::pair{Dispatch::all_to_all, 0.75}, {Dispatch::all_gather, 0.0}}) {
      SCOPED_TRACE(text("tensor ", degrees.tensor, ", expert ", degrees.expert, ", expert_tensor ", degrees.expert_tensor,
                        dispatcher == Dispatch::all_to_all ? ", all-to-all" : ", all-gather", ", capacity factor ", factor));
      ModelSettings settings{.dispatcher = dispatcher, .capacity = {factor, DropPolicy::weight}};
      const PassOutcome none = pass(architecture_of(true), degrees, settings);
      for (const Recompute recompute : {Recompute::selective, Recompute::full}) {
        settings.recompute = recompute;
        const PassOutcome again = pass(architecture_of(true), degrees, settings);
        expect_same_bits(again, none);
        EXPECT_LT(again.kept, none.kept);
      }
    }
  }
}

}  // namespace
}  // namespace upcycle
