// N experts, e one of them, L of them on this rank; C copies, G shards of a copy; R rows and W columns of a piece of a matrix
#include "train/expert_health.hpp"

#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>

#include "base/autograd.hpp"

namespace upcycle {
namespace {

struct Matrix {
  Part part;
  Tensor value_LRW;
  int64_t row;   ///< of its layer in all that is counted per layer
};

/// The experts' matrices on this rank, in an order that is the same on all ranks that hold others of the same layers.
std::vector<Matrix> matrices_of(const Weights& weights, const std::vector<int64_t>& layers) {
  std::vector<Matrix> out;
  for (const Weight& weight : weights.all()) {
    if (weight.spec().role != Role::expert) continue;
    weight.parameter.arrived();   // ZeRO-1 may still be gathering it
    for (const Part& part : weight.parts) {
      out.push_back({part, part.of(weight.parameter.value), std::find(layers.begin(), layers.end(), part.spec.layer) - layers.begin()});
    }
  }
  return out;
}

/// action(first row, number of rows), for pieces of which `copies` together have at most health_piece_elements; one row at least.
template <class Action>
void in_pieces(const Matrix& matrix, int64_t copies, Action&& action) {
  const int64_t rows = matrix.value_LRW.size(1);
  const int64_t most = std::max<int64_t>(1, health_piece_elements / (copies * matrix.value_LRW.size(2)));
  for (int64_t first = 0; first < rows; first += most) action(first, std::min(most, rows - first));
}

double square_of(const Tensor& x) { return x.to(at::kDouble).square().sum().item<double>(); }

enum Squares { kOwn, kDense, kDifference, kKinds };

/// ||expert||^2, ||d||^2, ||expert - d||^2, this rank's parts: fp64 [layers, N, kKinds] on the CPU, zero where others have it.
class Distances {
 public:
  Distances(const Recipe* recipe, const ReadDense* read) : recipe_(recipe), read_(read) {}

  void add(const Matrix& m, Tensor& squares_NK) {
    const Box& box = m.part.box;
    for (int64_t i = 0; i < box.size[0]; ++i) {
      Tensor here_K = squares_NK[box.begin[0] + i];
      in_pieces(m, 1, [&](int64_t first, int64_t rows) {
        const Tensor value_RW = m.value_LRW[i].narrow(0, first, rows);
        here_K[kOwn].add_(square_of(value_RW));
        if (!wanted() || !trouble_.empty()) return;
        try {
          const Box piece{{box.begin[0] + i, box.begin[1] + first, box.begin[2]}, {1, rows, box.size[2]}};
          const Tensor dense_1RW = dense_slice(m.part.spec, piece, *recipe_, *read_);
          const Tensor rounded_RW = dense_1RW[0].to(value_RW.scalar_type()).to(value_RW.device());
          here_K[kDense].add_(square_of(rounded_RW));
          here_K[kDifference].add_(square_of(value_RW.to(at::kDouble) - rounded_RW));
        } catch (const std::exception& error) {
          trouble_ = error.what();
        }
      });
    }
  }

  bool wanted() const { return recipe_ && read_; }
  const std::string& trouble() const { return trouble_; }

 private:
  const Recipe* recipe_;
  const ReadDense* read_;
  std::string trouble_;
};

/// The groups of experts over whose pairs means are taken: each shard's copies, and each copy's shards. Without a recipe, or where
/// there is one shard a copy, one group: all. Of a mixture that grew out of a smaller one the source's experts are the shards.
struct Groups {
  int64_t copies, shards;
  bool side_by_side = false;   ///< the copies of a shard are neighbours; else the shards of a copy
  int64_t shard(int64_t e) const { return side_by_side ? e / copies : e % shards; }
  int64_t copy(int64_t e) const { return side_by_side ? e % copies : e / shards; }
  int64_t sums() const { return shards + (shards > 1 ? copies : 0); }
  Tensor by_copy(const Tensor& x_N) const { return side_by_side ? x_N.view({shards, copies}).t() : x_N.view({copies, shards}); }
};

Groups groups_of(const Recipe* recipe, int64_t experts) {
  if (!recipe) return {experts, 1};
  return {recipe->copies, experts / recipe->copies, recipe->of_mixture()};
}

/// |sum of unit vectors|^2 of each group, and, last, of all experts; what this rank adds to the sum over its stage's expert_tensor ranks.
Tensor sums_of(const Matrix& m, const Groups& groups, const double* norm_N, const Communicator& along_expert) {
  Tensor squared_S = at::zeros({groups.sums() + 1}, at::kDouble);
  const Box& box = m.part.box;
  in_pieces(m, groups.sums(), [&](int64_t first, int64_t rows) {
    const Tensor value_LRW = m.value_LRW.narrow(1, first, rows);
    Tensor sum_SRW = at::zeros({groups.sums(), rows, value_LRW.size(2)}, value_LRW.options().dtype(at::kFloat));
    for (int64_t i = 0; i < box.size[0]; ++i) {
      const int64_t e = box.begin[0] + i;
      const double unit = norm_N[e] == 0 ? 0 : 1 / norm_N[e];   // NaN stays NaN
      sum_SRW[groups.shard(e)].add_(value_LRW[i], unit);
      if (groups.shards > 1) sum_SRW[groups.shards + groups.copy(e)].add_(value_LRW[i], unit);
    }
    along_expert.all_reduce(sum_SRW);
    for (int64_t s = 0; s < groups.sums(); ++s) squared_S[s].add_(square_of(sum_SRW[s]));
    squared_S[groups.sums()].add_(square_of(sum_SRW.narrow(0, 0, groups.shards).sum(0)));
  });
  return squared_S;
}

/// The mean cosine over the pairs of `n` unit vectors, of which `units` are not zero, out of the square of their sum's length.
double mean_cosine(double squared_sum, double units, int64_t n) {
  if (n < 2) return LayerHealth::kUnknown;
  return (squared_sum - units) / static_cast<double>(n * (n - 1));
}

LayerHealth health_of(const Groups& groups, const Tensor& squared_S, const Tensor& norm_N) {
  LayerHealth health;
  const int64_t experts = groups.copies * groups.shards;
  const auto units = [&](const Tensor& norms) { return norms.ne(0).sum().item<double>(); };
  const Tensor norm_CG = groups.by_copy(norm_N);
  const auto sum = [&](int64_t s) { return squared_S[s].item<double>(); };
  health.cosine = mean_cosine(sum(groups.sums()), units(norm_N), experts);
  double between = 0.0, inside = 0.0;
  for (int64_t g = 0; g < groups.shards; ++g) between += mean_cosine(sum(g), units(norm_CG.select(1, g)), groups.copies);
  health.cosine_between = between / static_cast<double>(groups.shards);
  if (groups.shards == 1) return health;
  for (int64_t c = 0; c < groups.copies; ++c) inside += mean_cosine(sum(groups.shards + c), units(norm_CG[c]), groups.shards);
  health.cosine_inside = inside / static_cast<double>(groups.copies);
  return health;
}

}  // namespace

ExpertHealth look_at_experts(const Weights& weights, const Mesh& mesh, const Recipe* recipe, const ReadDense* read,
                             const std::function<void()>& alive) {
  const Unrecorded guard;
  const Architecture& architecture = weights.architecture();
  std::vector<int64_t> layers;
  for (int64_t layer = 0; layer < architecture.layers; ++layer) {
    if (architecture.is_moe_layer(layer)) layers.push_back(layer);
  }
  const auto count = static_cast<int64_t>(layers.size());
  const std::vector<Matrix> matrices = matrices_of(weights, layers);

  // 1. Lengths and distances. Ranks along expert_data hold the same; the first of them counts. CPU tensors travel by MPI, in order.
  Tensor squares_YNK = at::zeros({count, architecture.experts, kKinds}, at::kDouble);
  Distances distances(recipe, read);
  if (mesh.here()[Axis::expert_data] == 0) {
    for (const Matrix& matrix : matrices) {
      Tensor squares_NK = squares_YNK[matrix.row];
      distances.add(matrix, squares_NK);
      alive();
    }
  }
  mesh.world().all_reduce(squares_YNK);
  ExpertHealth out;
  for (const std::string& theirs : mesh.world().all_gather(distances.trouble())) {
    if (out.trouble.empty()) out.trouble = theirs;
  }

  // 2. Sums of unit vectors, over all experts of a layer.
  const Groups groups = groups_of(recipe, architecture.experts);
  const Tensor norm_YN = squares_YNK.select(2, kOwn).sqrt().contiguous();
  Tensor squared_YS = at::zeros({count, groups.sums() + 1}, at::kDouble);
  for (const Matrix& matrix : matrices) {
    const double* const norm_N = norm_YN[matrix.row].const_data_ptr<double>();
    squared_YS[matrix.row].add_(sums_of(matrix, groups, norm_N, mesh.along(Axis::expert)));
    alive();
  }
  if (mesh.here()[Axis::expert_data] != 0 || mesh.here()[Axis::expert] != 0) squared_YS.zero_();
  mesh.world().all_reduce(squared_YS);

  for (int64_t y = 0; y < count; ++y) {
    LayerHealth& health = out.layers.emplace_back(health_of(groups, squared_YS[y], norm_YN[y]));
    health.layer = layers[static_cast<size_t>(y)];
    if (!recipe) health.cosine_between = LayerHealth::kUnknown;
    if (!distances.wanted() || !out.trouble.empty()) continue;
    const Tensor distance_N = (squares_YNK[y].select(1, kDifference) / squares_YNK[y].select(1, kDense)).sqrt().contiguous();
    health.distance.assign(distance_N.const_data_ptr<double>(), distance_N.const_data_ptr<double>() + distance_N.numel());
  }
  return out;
}

}  // namespace upcycle
