#include "train/byte_progress.hpp"

#include <algorithm>
#include <cmath>
#include <iomanip>

#include "base/error.hpp"
#include "base/log.hpp"

namespace upcycle {

std::string progress_line(const std::string& doing, double bytes, double all_bytes, double seconds_per_byte) {
  const bool giga = all_bytes >= 1e9;
  const double unit = giga ? 1e9 : 1e6;
  const double share = all_bytes > 0 ? std::min(1.0, bytes / all_bytes) : 1.0;
  std::string line = text(doing, ": ", std::fixed, std::setprecision(giga ? 2 : 0), bytes / unit, " of ", all_bytes / unit, giga ? " GB, " : " MB, ",
                          std::setprecision(0), std::floor(100 * share), " %");
  if (!(seconds_per_byte > 0) || !std::isfinite(seconds_per_byte)) return line;
  const double left = std::max(0.0, all_bytes - bytes) * seconds_per_byte;
  line += text(", ", std::fixed, std::setprecision(0), 1e-6 / seconds_per_byte, " MB/s, ");
  if (left < 120) return line + text(std::fixed, std::setprecision(0), std::ceil(left), " s left");
  return line + text(std::fixed, std::setprecision(0), std::ceil(left / 60), " min left");
}

void ByteProgress::show(uint64_t done, uint64_t total) {
  if (!log::on_terminal()) return;
  constexpr std::chrono::milliseconds kBetween{200};
  constexpr std::chrono::seconds kWindow{10};
  const Clock::time_point now = Clock::now();
  if (!seen_.empty() && now - seen_.back().first < kBetween && done < total) return;
  const double bytes = total == 0 ? all_bytes_ : all_bytes_ * static_cast<double>(done) / static_cast<double>(total);
  seen_.emplace_back(now, bytes);
  while (seen_.size() > 2 && now - seen_[1].first > kWindow) seen_.pop_front();
  const double seconds = std::chrono::duration<double>(now - seen_.front().first).count(), moved = bytes - seen_.front().second;
  log::progress(progress_line(doing_, bytes, all_bytes_, moved > 0 ? seconds / moved : 0.0));
}

}  // namespace upcycle
