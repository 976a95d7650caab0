#include "base/progress_watch.hpp"

#include <algorithm>

#include "base/error.hpp"

namespace upcycle {

ProgressWatch::ProgressWatch(ProgressLimits limits) : limits_(limits) {}

void ProgressWatch::look(const std::vector<Heartbeat>& beats, double passed) {
  if (looked_) now_ += passed;
  const bool there = !beats.empty() && beats.front().found;
  if (!looked_ && there) old_ = beats.front();
  looked_ = true;
  if (!there) return;
  const Heartbeat& first = beats.front();
  if (!begun_ && first.life == old_.life && first.count == old_.count) return;
  if (!begun_ || first.life != last_.front().beat.life || beats.size() != last_.size()) {
    if (begun_) began_ = now_;   // the job script has started it again
    begun_ = true;
    last_.assign(beats.size(), {{}, now_, now_, false});
  }
  for (size_t rank = 0; rank < beats.size(); ++rank) {
    Seen& seen = last_[rank];
    const Heartbeat& beat = beats[rank];
    if (!beat.found || seen.beat.count != beat.count) seen.changed = beat.found ? now_ : seen.changed;
    if (seen.beat.step != beat.step || seen.beat.doing != beat.doing) seen.phase = now_;
    seen.stepped = seen.stepped || (beat.found && beat.doing == "training");
    seen.beat = beat;
  }
}

std::vector<Sighting> ProgressWatch::sightings(double limit) const {
  const double silent = std::min(15.0, limit / 2);   // a heartbeat comes every 5 s
  std::vector<Sighting> out;
  for (const Seen& seen : last_) {
    Sighting sighting{seen.beat, seen.beat.found ? life_of(seen.beat.process) : Life::unknown, 0};
    if (now_ - seen.changed > silent) sighting.unchanged = now_ - seen.changed;
    out.push_back(std::move(sighting));
  }
  return out;
}

std::optional<std::string> ProgressWatch::verdict() const {
  if (!begun_) {
    if (now_ <= limits_.start) return std::nullopt;
    return text("no rank has begun within ", limits_.start, " s (--start)");
  }
  for (const Seen& seen : last_) {
    const std::string& doing = seen.beat.doing;
    if (doing == "finished" || doing == "failed") continue;
    const double phase = now_ - seen.phase;
    const auto passed = [&](double limit, const std::string& what, const char* option) -> std::optional<std::string> {
      return text(what, " for more than ", limit, " s (", option, "): ", accuse(sightings(limit)));
    };
    if (!seen.stepped) {
      if (now_ - began_ > limits_.start) return passed(limits_.start, "no first step", "--start");
    } else if (doing == "training") {
      if (phase > limits_.step) return passed(limits_.step, "no step", "--step");
    } else if (doing == "writing a checkpoint") {
      if (phase > limits_.checkpoint) return passed(limits_.checkpoint, doing, "--checkpoint");
    } else if (phase > limits_.start) {
      return passed(limits_.start, doing, "--start");
    }
  }
  return std::nullopt;
}

}  // namespace upcycle
