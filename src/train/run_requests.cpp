#include "train/run_requests.hpp"

#include <limits>

#include "base/error.hpp"
#include "base/log.hpp"
#include "base/text_file.hpp"
#include "checkpoint/durable.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;

std::optional<struct stat> status_of(const fs::path& path) {
  struct stat status {};
  if (::stat(path.c_str(), &status) != 0) return std::nullopt;
  return status;
}

bool same_file(const struct stat& a, const struct stat& b) {
  return a.st_dev == b.st_dev && a.st_ino == b.st_ino && a.st_mtim.tv_sec == b.st_mtim.tv_sec && a.st_mtim.tv_nsec == b.st_mtim.tv_nsec;
}

}  // namespace

void refuse_stop_file(const fs::path& directory) {
  if (status_of(directory / "stop")) fail((directory / "stop").string(), " is there, which stops this run: remove it to let the run go on");
}

void mark_finished(const fs::path& directory, int64_t step) { write_text_durably(directory / "finished", text("step ", step, "\n")); }

Unfinished::Unfinished(const fs::path& directory) : file_(directory / "finished"), was_there_(fs::exists(file_)) {
  if (!was_there_) return;
  content_ = text_of(file_);
  std::error_code error;
  if (!fs::remove(file_, error)) fail(file_.string(), ": can't be removed (", error.message(), "), though this run has more steps to do");
  make_durable(directory);
}

Unfinished::~Unfinished() {
  if (!was_there_) return;
  try {
    write_text_durably(file_, content_);
  } catch (const std::exception& error) {
    log::warning(text(file_.string(), " could not be put back: ", error.what()));
  }
}

RunRequests::RunRequests(fs::path directory, bool looks) : directory_(std::move(directory)), looks_(looks) {}

void RunRequests::look() {
  const auto now = std::chrono::steady_clock::now();
  if (!looks_ || (looked_ && now - *looked_ < std::chrono::seconds(1))) return;
  looked_ = now;
  if (!stop_ && status_of(directory_ / "stop")) {
    stop_ = true;
    log::info(text((directory_ / "stop").string(), " is there: saving, and leaving"));
  }
  if (asked_) return;
  asked_ = status_of(directory_ / "save");
  if (asked_) log::info(text((directory_ / "save").string(), " is there: saving"));
}

void RunRequests::saving(int64_t step) {
  if (save()) saving_ = step;
}

void RunRequests::published(int64_t step) {
  if (saving_ < 0 || step < saving_) return;
  const fs::path path = directory_ / "save";
  const auto there = status_of(path);
  std::error_code error;
  if (there && same_file(*there, *asked_) && !fs::remove(path, error) && error) {
    log::warning(text(path.string(), ": can't be removed (", error.message(), "), and would ask for a checkpoint again and again: it is taken no notice of any more"));
    saving_ = std::numeric_limits<int64_t>::max();
    return;
  }
  asked_.reset();
  saving_ = -1;
}

}  // namespace upcycle
