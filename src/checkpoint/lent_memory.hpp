#pragma once
#include <c10/core/Device.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/blocks.hpp"
#include "device/host_pages.hpp"

namespace upcycle {

/// Memory that is lent in parts which begin on pages, out of a few larger pieces that stay. A part goes where there is room behind the parts
/// that were lent before; a piece begins anew when all of its parts are back. Not for several threads.
class LentMemory {
 public:
  /// A part of `bytes`, rounded up to pages; nothing where no piece has the room.
  std::optional<std::span<std::byte>> lend(int64_t bytes);
  /// `part` as it was lent.
  void give_back(std::span<std::byte> part);
  void add(device::HostPages piece) { pieces_.push_back({std::move(piece)}); }
  /// Frees pieces of which nothing is lent until at most `bytes` are held, or none is left.
  void shrink(uint64_t bytes);

  /// Bytes of all pieces.
  uint64_t held() const;
  bool lends() const;

 private:
  struct Piece {
    device::HostPages memory;
    size_t end = 0;      ///< of the last part that was lent
    size_t parts = 0;    ///< that are not back
  };
  std::vector<Piece> pieces_;
};

}  // namespace upcycle
