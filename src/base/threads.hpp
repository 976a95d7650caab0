#pragma once
#include <cstdint>
#include <functional>

namespace upcycle {

/// Calls `work(begin, end)` for ranges that together are [0, count), on as many threads as LibTorch uses (OMP_NUM_THREADS), none with fewer
/// than `grain` numbers. Returns when all are done; the first exception of a range is thrown again. For work of LibTorch's kind that is not
/// one of its operations: its own parallel_for needs a compiler's OpenMP, of which a process should have one only.
void for_ranges(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& work);

}  // namespace upcycle
