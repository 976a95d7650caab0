#pragma once
#include <c10/core/ScalarType.h>

#include <cstdint>
#include <vector>

#include "base/tensor.hpp"

namespace upcycle {

/// Elements [begin, end) of something flat.
struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
  bool operator==(const Range&) const = default;
};

/// A rank among the holders of the same boxes.
struct Place {
  int64_t holders = 1;
  int64_t index = 0;
  bool spans_stages = false;   ///< some of them are of another pipeline stage
};

/// Weights that the same ranks hold, end to end in memory in one dtype: what travels in one call, gradients and values alike.
struct Bucket {
  size_t group = 0;                 ///< of HolderGroups::partitions(): the ranks that sum these gradients
  Place place;                      ///< of this rank among them
  at::ScalarType dtype = at::kFloat;
  std::vector<size_t> weights;      ///< indices, in the order in which backward completes them
  std::vector<Range> runs;            ///< where each lies; what is between them stays zero
  int64_t size = 0;
  Range own;                          ///< the elements whose masters and moments this rank keeps: all, or with ZeRO-1 an equal part

  Tensor values;                    ///< [size]
  Tensor gradients;                 ///< [size], fp32
  Tensor masters;                   ///< fp32; of `own`, once training has started; a view of `values` where those are fp32

  bool divided() const { return own.size() < size; }
  /// What this rank owns of the bucket's weight number `i`.
  Range owned(size_t i) const;
};

/// A weight, as far as buckets go.
struct Stored {
  size_t group;
  at::ScalarType dtype;
  int64_t elements;
  int64_t nominal;   ///< about as many, and the same number on all ranks of the stage: bucket limits must not depend on the rank
};

/// Elements of a bucket; a larger weight has one of its own. Enough for the network's full speed, few enough that the first bucket
/// is on its way early in backward. Lowered by tests.
inline int64_t bucket_elements = int64_t{1} << 25;

/// Who goes into which bucket, from the last weight to the first, since backward completes them in that order; `places` by group.
/// All ranks of a stage get the same list. Groups that span stages come last: they wait for another stage's backward.
/// `zero` 1: each holder owns an equal part (ZeRO-1: Rajbhandari et al., 1910.02054); 0: everyone owns all. Allocates nothing.
std::vector<Bucket> plan_buckets(const std::vector<Stored>&, const std::vector<Place>& places, int64_t zero);

}  // namespace upcycle
