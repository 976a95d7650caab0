#pragma once
#include <algorithm>
#include <cstdint>

struct CUstream_st;

// Shapes: N choices, E experts of a range, R rows.
namespace upcycle::cuda {

/// A stable counting sort of choices by expert. Experts outside of first .. first + experts count as one more, the last.
struct Sort {
  const int64_t* expert;   ///< [N], N < 2^31
  int64_t choices, first, experts;
  int32_t* space;          ///< sort_space(choices, experts) numbers of any value
  int64_t* choice;         ///< [R]: the choice of each row; of slots, those that get none stay as they are
  int64_t* row;            ///< [N]: the row of each choice; R: it has none
  int32_t* end;            ///< [E]: the rows of expert e are end[e-1] .. end[e]
  int64_t rows;            ///< R: the first so many in order; of slots, experts * slots
  int64_t slots;           ///< rows of each expert; 0: as many as it has choices
};
void sort_by_expert(const Sort&, CUstream_st*);

/// count[e]: the choices of expert first + e. [E]
struct Count {
  const int64_t* expert;
  int64_t choices, first, experts;
  int32_t* space;
  int64_t* count;
};
void count_by_expert(const Count&, CUstream_st*);

/// The most experts of a range: a block counts them in its 48 KiB of shared memory.
inline constexpr int64_t kMostSortedExperts = 12'000;
/// Choices of one block, and their blocks.
inline constexpr int64_t kSortStretch = 512;
inline int64_t sort_tile(int64_t choices) { return kSortStretch * std::max<int64_t>(1, (choices + 1024 * kSortStretch - 1) / (1024 * kSortStretch)); }
inline int64_t sort_tiles(int64_t choices) { return std::max<int64_t>(1, (choices + sort_tile(choices) - 1) / sort_tile(choices)); }
inline int64_t sort_space(int64_t choices, int64_t experts) { return (experts + 1) * (sort_tiles(choices) + 1); }

}  // namespace upcycle::cuda
