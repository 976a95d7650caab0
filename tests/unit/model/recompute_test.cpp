// A layer that computes again what it did not keep: the same numbers to the last bit, and less memory between forward and backward.
#include "support/stage_pass.hpp"

namespace upcycle {
namespace {

TEST(Recompute, SameBitsLessMemory) {
  for (const bool moe : {false, true}) {
    for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
      SCOPED_TRACE(testing::Message() << (moe ? "experts" : "dense") << ", " << dtype);
      const Architecture architecture = architecture_of(moe);
      const PassOutcome none = pass(architecture, {}, {}, dtype);
      const PassOutcome selective = pass(architecture, {}, {.recompute = Recompute::selective}, dtype);
      const PassOutcome full = pass(architecture, {}, {.recompute = Recompute::full}, dtype);
      for (size_t i = 1; i + 2 < none.gradients.size(); ++i) EXPECT_GT(none.gradients[i].norm().item<double>(), 0.0);   // all of the layers'
      expect_same_bits(selective, none);
      expect_same_bits(full, none);
      EXPECT_LT(selective.kept, 0.8 * none.kept) << none.kept;
      EXPECT_LT(full.kept, 0.5 * selective.kept) << selective.kept;
      EXPECT_LT(selective.peak, none.peak);
      EXPECT_LT(full.peak, selective.peak);
    }
  }
}

TEST(Recompute, WhatWasDroppedStaysDroppedAndIsCountedOnce) {
  for (const bool pad : {false, true}) {
    ModelSettings settings{.capacity = {0.75, DropPolicy::weight}, .pad_to_capacity = pad};
    const PassOutcome none = pass(architecture_of(true), {}, settings);
    EXPECT_GT(none.counts[2].item<int64_t>(), 0);
    for (const Recompute recompute : {Recompute::selective, Recompute::full}) {
      settings.recompute = recompute;
      expect_same_bits(pass(architecture_of(true), {}, settings), none);
    }
  }
}

}  // namespace
}  // namespace upcycle
