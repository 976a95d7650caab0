#include "checkpoint/lent_memory.hpp"

#include <algorithm>
#include <stdexcept>

namespace upcycle {

std::optional<std::span<std::byte>> LentMemory::lend(int64_t bytes) {
  const size_t page = Blocks::kAlignment, wanted = static_cast<size_t>(bytes), size = (wanted + page - 1) / page * page;
  for (Piece& piece : pieces_) {   // the first that has room: small parts fill what large ones left over
    if (piece.memory.bytes().size() - piece.end < size) continue;
    const std::span<std::byte> part = piece.memory.bytes().subspan(piece.end, wanted);
    piece.end += size;
    ++piece.parts;
    return part;
  }
  return std::nullopt;
}

void LentMemory::give_back(std::span<std::byte> part) {
  const auto holds = [&](const Piece& piece) {
    const std::byte* const begin = piece.memory.bytes().data();
    return begin <= part.data() && part.data() < begin + piece.memory.bytes().size();
  };
  const auto piece = std::find_if(pieces_.begin(), pieces_.end(), holds);
  if (piece == pieces_.end() || piece->parts == 0) throw std::logic_error("this memory was not lent");
  if (--piece->parts == 0) piece->end = 0;
}

void LentMemory::shrink(uint64_t bytes) {
  for (size_t i = pieces_.size(); i-- > 0 && held() > bytes;) {
    if (pieces_[i].parts == 0) pieces_.erase(pieces_.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

uint64_t LentMemory::held() const {
  uint64_t bytes = 0;
  for (const Piece& piece : pieces_) bytes += piece.memory.bytes().size();
  return bytes;
}

bool LentMemory::lends() const {
  return std::any_of(pieces_.begin(), pieces_.end(), [](const Piece& piece) { return piece.parts > 0; });
}

}  // namespace upcycle
