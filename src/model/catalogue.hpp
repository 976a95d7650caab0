#pragma once
#include <optional>
#include <string>
#include <vector>

#include "base/box.hpp"
#include "config/architecture.hpp"
#include "parallel/grid.hpp"

namespace upcycle {

/// How the mesh cuts a parameter: `dim` into equal parts over `axis`. Several cuts of one parameter are of different dims.
struct Cut {
  Axis axis;
  int64_t dim;
  /// Whole things that lie along `dim` (heads, experts) and are not cut through; 0: single rows, parts differ by one where they do not divide.
  /// Fewer units than ranks: each unit is held by several neighbouring ranks.
  int64_t units = 0;
};

enum class Role { embedding, head, norm, attention, feed_forward, router, expert };

/// One parameter of the whole model, under Hugging Face's name. Experts are stacked: "model.layers.0.mlp.experts.up_proj.weight"
/// [N, f, h] stands for HF's "...experts.{e}.up_proj.weight" [f, h].
struct ParameterSpec {
  std::string name;
  Shape shape;
  std::vector<Cut> cuts;
  Role role;
  int64_t layer = -1;        ///< -1: embedding, final norm, head
  bool residual = false;     ///< writes into the residual stream (o_proj, down_proj): smaller random initialisation

  bool decays() const { return role != Role::norm; }
  /// Routers stay in fp32 in any precision: a rounded logit is a tie, a tie is another expert.
  bool always_fp32() const { return role == Role::router; }
};

/// Every parameter, in the order in which a forward pass meets them. Pure. A tied head is not listed: it is the embedding.
std::vector<ParameterSpec> catalogue(const Architecture&);

/// The spec called `name`; throws std::out_of_range.
const ParameterSpec& find(const std::vector<ParameterSpec>&, const std::string& name);

/// The grid and which pipeline stage owns which layers.
struct Layout {
  Grid grid;
  std::vector<int> stage_of_layer;   ///< [layers]
  bool tied = false;                 ///< the embedding is needed on the last stage too

  /// Layers spread evenly, earlier stages taking one more where it does not divide.
  static Layout even(const Grid&, const Architecture&);
};

/// Throws UserError naming axis, parameter and numbers when `grid` does not cut `architecture` evenly.
void check_divides(const Architecture&, const Grid&);

/// Whether the ranks of `stage` hold (their boxes of) the parameter.
bool owns(const ParameterSpec&, const Layout&, int stage);

/// The part of `spec` that the rank at `coordinates` holds; empty when its stage does not own the parameter.
/// KV projections with fewer heads than tensor ranks are replicated: several ranks get the same box.
std::optional<Box> local_box(const ParameterSpec&, const Layout&, const Coordinates&);

/// Numbers of parameters: all, and those one token uses (embedding and head included, K of N experts).
struct ParameterCount {
  int64_t total = 0;
  int64_t active = 0;
};
ParameterCount count_parameters(const Architecture&);

}  // namespace upcycle
