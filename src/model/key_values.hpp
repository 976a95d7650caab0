#pragma once
#include <map>
#include <utility>

#include "base/tensor.hpp"

// Shapes: B sequences, S new positions and P all so far, G key/value heads of this rank, D head width.
namespace upcycle {

/// The keys and values of some sequences up to where they are now, layer by layer: with them, what follows is computed without computing
/// again what came before. B, G, D, dtype and device are those of what is put in first.
class KeyValues {
 public:
  /// Memory for `room` positions is taken layer by layer, when the first come.
  explicit KeyValues(int64_t room) : room_(room) {}

  int64_t room() const noexcept { return room_; }
  /// Positions that all layers have seen.
  int64_t length() const noexcept { return length_; }

  /// The next positions of `layer`, [B, S, G, D] each; returns all of the layer so far, [B, P, G, D], views into this. Throws
  /// std::logic_error when there is no room.
  std::pair<Tensor, Tensor> with(int64_t layer, const Tensor& k_BSGD, const Tensor& v_BSGD);
  /// All layers have seen `positions` more.
  void advance(int64_t positions) noexcept { length_ += positions; }
  /// Forgets what comes after the first `length`.
  void shorten(int64_t length) noexcept { length_ = length; }

 private:
  int64_t room_, length_ = 0;
  std::map<int64_t, std::pair<Tensor, Tensor>> of_layer_;   ///< [B, room, G, D] each
};

}  // namespace upcycle
