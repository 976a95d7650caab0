// f hidden units, G clusters of f/G units, S numbers of a unit's sketch
#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "base/error.hpp"
#include "upcycle/units.hpp"

namespace upcycle {

namespace {

constexpr int64_t kSketch = 512, kRowsAtOnce = 256, kRounds = 20;

/// Count sketch (Charikar, Chen and Farach-Colton, 2002): every coordinate is added to one of `size` numbers, with a random sign.
/// Expected inner products are those of the rows. Rows no longer than the sketch stay what they are.
class Sketch {
 public:
  Sketch(int64_t length, uint64_t seed) : size_(std::min(length, kSketch)), place_(static_cast<size_t>(length)), sign_(place_.size(), 1.0) {
    const Random place(seed, "sketch of hidden units/place"), sign(seed, "sketch of hidden units/sign");
    for (size_t i = 0; i < place_.size(); ++i) {
      place_[i] = length <= kSketch ? i : place.below(kSketch, i);
      if (length > kSketch && sign.bits(i) % 2) sign_[i] = -1.0;
    }
  }
  int64_t size() const { return size_; }
  /// Adds `row`, scaled to length 1 unless it is 0, as coordinates from `first` on.
  void add(const float* row, int64_t length, int64_t first, std::vector<double>& sketch) const {
    double squares = 0;
    for (int64_t i = 0; i < length; ++i) squares += static_cast<double>(row[i]) * row[i];
    if (!(squares > 0) || !std::isfinite(squares)) return;   // nowhere; what is not finite the certificate tells
    const double scale = 1 / std::sqrt(squares);
    for (int64_t i = 0; i < length; ++i) {
      const auto at = static_cast<size_t>(first + i);
      sketch[place_[at]] += sign_[at] * scale * row[i];
    }
  }

 private:
  int64_t size_;
  std::vector<size_t> place_;
  std::vector<double> sign_;
};

using Vectors = std::vector<float>;   // [count, S], each of length 1 or 0

void set_unit(const std::vector<double>& from, float* to) {
  double squares = 0;
  for (const double x : from) squares += x * x;
  const double scale = squares > 0 ? 1 / std::sqrt(squares) : 0;
  for (size_t i = 0; i < from.size(); ++i) to[i] = static_cast<float>(from[i] * scale);
}

Vectors sketches(const Recipe& recipe, int64_t layer, const ReadDense& read, int64_t& size) {
  const int64_t f = recipe.source.ffn, h = recipe.source.hidden;
  const Sketch sketch(2 * h, recipe.seed);
  size = sketch.size();
  Vectors out(static_cast<size_t>(f * size));
  for (int64_t begin = 0; begin < f; begin += kRowsAtOnce) {
    const int64_t rows = std::min(kRowsAtOnce, f - begin);
    std::array<Tensor, 2> values;
    for (size_t m = 0; m < 2; ++m) {
      const std::string name = text("model.layers.", layer, ".mlp.", m == 0 ? "gate" : "up", "_proj.weight");
      values[m] = read(name, {{begin, 0}, {rows, h}}).to(at::kFloat).contiguous();
    }
    for (int64_t row = 0; row < rows; ++row) {
      std::vector<double> sum(static_cast<size_t>(size), 0.0);
      for (size_t m = 0; m < 2; ++m) sketch.add(values[m].const_data_ptr<float>() + row * h, h, static_cast<int64_t>(m) * h, sum);
      set_unit(sum, out.data() + (begin + row) * size);
    }
  }
  return out;
}

/// Four sums, added at the end: the same order always, and no wait of an addition for the one before.
double inner(const float* a, const float* b, int64_t size) {
  double sum0 = 0, sum1 = 0, sum2 = 0, sum3 = 0;
  int64_t i = 0;
  for (; i + 4 <= size; i += 4) {
    sum0 += static_cast<double>(a[i]) * b[i], sum1 += static_cast<double>(a[i + 1]) * b[i + 1];
    sum2 += static_cast<double>(a[i + 2]) * b[i + 2], sum3 += static_cast<double>(a[i + 3]) * b[i + 3];
  }
  for (; i < size; ++i) sum0 += static_cast<double>(a[i]) * b[i];
  return (sum0 + sum1) + (sum2 + sum3);
}

/// Each centre in turn is the unit that is least like those before it.
std::vector<float> far_apart(const Vectors& units, int64_t f, int64_t G, int64_t size) {
  std::vector<float> centres(units.begin(), units.begin() + size);
  std::vector<double> nearest(static_cast<size_t>(f), -std::numeric_limits<double>::infinity());
  for (int64_t g = 1; g < G; ++g) {
    int64_t chosen = 0;
    for (int64_t u = 0; u < f; ++u) {
      double& near = nearest[static_cast<size_t>(u)];
      near = std::max(near, inner(units.data() + u * size, centres.data() + (g - 1) * size, size));
      if (near < nearest[static_cast<size_t>(chosen)]) chosen = u;
    }
    centres.insert(centres.end(), units.begin() + chosen * size, units.begin() + (chosen + 1) * size);
  }
  return centres;
}

/// The most similar pairs of unit and centre first, as long as the centre has room; of equals, the lower unit and centre.
std::vector<int32_t> assign(const Vectors& units, const std::vector<float>& centres, int64_t f, int64_t G, int64_t size) {
  struct Pair {
    double similarity;
    int32_t unit, centre;
  };
  std::vector<Pair> pairs;
  pairs.reserve(static_cast<size_t>(f * G));
  for (int64_t u = 0; u < f; ++u) {
    for (int64_t g = 0; g < G; ++g) {
      pairs.push_back({inner(units.data() + u * size, centres.data() + g * size, size), static_cast<int32_t>(u), static_cast<int32_t>(g)});
    }
  }
  std::sort(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) {
    if (a.similarity != b.similarity) return a.similarity > b.similarity;
    return a.unit != b.unit ? a.unit < b.unit : a.centre < b.centre;
  });
  std::vector<int32_t> out(static_cast<size_t>(f), -1);
  std::vector<int64_t> room(static_cast<size_t>(G), f / G);
  for (const Pair& pair : pairs) {
    int32_t& mine = out[static_cast<size_t>(pair.unit)];
    int64_t& free = room[static_cast<size_t>(pair.centre)];
    if (mine >= 0 || free == 0) continue;
    mine = pair.centre, --free;
  }
  return out;
}

void move_centres(const Vectors& units, const std::vector<int32_t>& cluster, std::vector<float>& centres, int64_t G, int64_t size) {
  std::vector<std::vector<double>> sums(static_cast<size_t>(G), std::vector<double>(static_cast<size_t>(size), 0.0));
  for (size_t u = 0; u < cluster.size(); ++u) {
    std::vector<double>& sum = sums[static_cast<size_t>(cluster[u])];
    for (int64_t i = 0; i < size; ++i) sum[static_cast<size_t>(i)] += units[u * static_cast<size_t>(size) + static_cast<size_t>(i)];
  }
  for (int64_t g = 0; g < G; ++g) set_unit(sums[static_cast<size_t>(g)], centres.data() + g * size);
}

}  // namespace

std::vector<int64_t> cluster_units(const Recipe& recipe, int64_t layer, const ReadDense& read) {
  const int64_t f = recipe.source.ffn, G = recipe.granularity;
  int64_t size = 0;
  const Vectors units = sketches(recipe, layer, read, size);
  std::vector<float> centres = far_apart(units, f, G, size);
  std::vector<int32_t> cluster = assign(units, centres, f, G, size);
  for (int64_t round = 0; round < kRounds; ++round) {
    move_centres(units, cluster, centres, G, size);
    std::vector<int32_t> next = assign(units, centres, f, G, size);
    if (next == cluster) break;
    cluster = std::move(next);
  }
  // Shard g is the g-th cluster to be met, its units ascending.
  std::vector<std::vector<int64_t>> members(static_cast<size_t>(G));
  std::vector<int32_t> met;
  for (int64_t u = 0; u < f; ++u) {
    const int32_t g = cluster[static_cast<size_t>(u)];
    if (members[static_cast<size_t>(g)].empty()) met.push_back(g);
    members[static_cast<size_t>(g)].push_back(u);
  }
  std::vector<int64_t> order;
  for (const int32_t g : met) order.insert(order.end(), members[static_cast<size_t>(g)].begin(), members[static_cast<size_t>(g)].end());
  return order;
}

}  // namespace upcycle
