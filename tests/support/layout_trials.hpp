#pragma once
#include <array>

#include "parallel/every_layout.hpp"

// Which tiny model (tiny_training.hpp) and which recompute mode every layout is trained with. Pure, so that it is known without training
// that each axis meets all of them (tests/unit/parallel/every_layout_test.cpp).
namespace upcycle {

inline constexpr size_t kTinyModels = 4;

/// Layers and sequences a step that a layout of `world` ranks needs.
inline int64_t depth_for(const ParallelSection& p, int world) {
  const int64_t data = world / (p.tensor * p.context * p.pipeline);
  return p.pipeline * p.virtual_stages <= 4 && data <= 4 ? 4 : 8;
}

struct LayoutTrial {
  ParallelSection layout;
  size_t model;          ///< of tiny_models(depth_for(layout))
  Recompute recompute;   ///< changes no number
};

/// The layouts of `world` ranks whose chunks the model has layers for: all of them, or of 8 ranks a fixed spread.
inline std::vector<LayoutTrial> layout_trials(int world, bool all) {
  constexpr size_t kSpread = 66;
  const std::vector<ParallelSection> layouts = every_layout(world);
  const size_t taken = all || world < 8 ? layouts.size() : kSpread;
  std::vector<LayoutTrial> trials;
  for (size_t i = 0; i < taken; ++i) {
    const ParallelSection& layout = layouts[i * layouts.size() / taken];
    if (layout.pipeline * layout.virtual_stages > depth_for(layout, world)) continue;
    // Where all are taken, zero 0 and 1 of a layout follow one another, then its virtual stages 1 and 2: i / 24 keeps the turn of
    // 4 models and 3 modes from moving in step with them.
    const size_t turn = i / 2 + i / 24;
    trials.push_back({layout, turn % kTinyModels, std::array{Recompute::none, Recompute::selective, Recompute::full}[turn % 3]});
  }
  return trials;
}

}  // namespace upcycle
