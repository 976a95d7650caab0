#pragma once
#include <chrono>
#include <cstdint>
#include <deque>
#include <string>
#include <utility>

namespace upcycle {

/// "exporting: 1.2 of 3.4 GB, 36 %, 512 MB/s, 4 s left", as bytes of a long transfer go by; without what is not known yet.
/// `seconds_per_byte` <= 0: not known.
std::string progress_line(const std::string& doing, double bytes, double all_bytes, double seconds_per_byte);

/// Shows such a line (log::progress) a few times a second. The rate is that of the last ten seconds: what an interrupted attempt left
/// passes faster than what has to be made.
class ByteProgress {
 public:
  /// `all_bytes`: of all ranks.
  ByteProgress(std::string doing, uint64_t all_bytes) : doing_(std::move(doing)), all_bytes_(static_cast<double>(all_bytes)) {}
  /// This rank has done `done` of its own `total` bytes; the others are taken to be as far.
  void show(uint64_t done, uint64_t total);

 private:
  using Clock = std::chrono::steady_clock;
  std::string doing_;
  double all_bytes_;
  std::deque<std::pair<Clock::time_point, double>> seen_;   ///< bytes of all ranks
};

}  // namespace upcycle
