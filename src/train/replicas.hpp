#pragma once
#include <string>
#include <vector>

#include "device/side_stream.hpp"
#include "model/weights.hpp"
#include "parallel/mesh.hpp"

namespace upcycle {

/// What the ranks that hold the same weights do together: they sum gradients while backward still runs, and with ZeRO-1 each hands
/// the others the values it has updated. Bucket by bucket, in one order on all ranks of a stage, beside the computation.
class Replicas {
 public:
  /// **Collective.** Makes one communicator per way in which the world falls into holders of the same slices, in a fixed order.
  /// After Mesh::prepare and Weights::allocate. The weights outlive it; one Replicas of them at a time.
  Replicas(Weights&, const Mesh&);
  ~Replicas();
  Replicas(const Replicas&) = delete;
  Replicas& operator=(const Replicas&) = delete;

  /// **Collective.** The end of a step's backward passes: every gradient is summed over the ranks that hold the same slice (with
  /// ZeRO-1 only what this rank owns of it). On a GPU that goes on beside what follows: see wait_for_sum. From the second step on most of it
  /// has happened already: a bucket's sum is launched by the last addition to it. Each step must add as often to each bucket as the
  /// first one (std::logic_error).
  void sum_gradients();
  /// The current stream goes on when this bucket's sum, and those of the buckets before it, are there. After each sum_gradients for the last
  /// bucket at least.
  void wait_for_sum(size_t bucket) const;

  /// **Collective**, with the same bucket everywhere. With ZeRO-1: gives every holder the bucket's values that this rank has updated, and
  /// takes theirs. On a GPU that goes on beside what follows, the next bucket's update above all: whoever wants a value says Parameter::arrived().
  void share_values(size_t bucket);

  /// **Collective.** Compares what ranks hold alike: values, and masters where everybody keeps all of them. One line for each weight that
  /// is not the same on all its holders, "model.norm.weight: ranks 0, 1, 3 and rank 2 differ", told by the first of them; empty on all
  /// others. Of each weight the sum of its bits is compared, as 64-bit integers, on the device: exact in whatever order, read once at
  /// memory's speed, 16 bytes a weight travel. One changed bit always shows; changes that cancel in a sum of 2^64 do not. Waits for the device.
  std::vector<std::string> differences();

 private:
  void added(size_t bucket);
  void launch_next();
  void wait_for_values(size_t bucket);

  Weights& weights_;
  std::vector<Communicator> groups_;     ///< by index of weights.groups().partitions()
  std::vector<std::vector<int>> members_;   ///< of each: their ranks in the world
  device::SideStream beside_;
  std::vector<device::SideStream::Mark> summed_;           ///< by bucket
  std::vector<device::SideStream::Mark> values_arrived_;   ///< by bucket; null when nothing is on its way
  std::vector<int64_t> additions_;       ///< to each bucket, in this step
  std::vector<int64_t> expected_;        ///< in every step; empty until the first one is over
  size_t next_ = 0;                      ///< the bucket to be launched next
};

}  // namespace upcycle
