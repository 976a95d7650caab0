#include "train/metrics.hpp"

#include <cmath>
#include <cstdio>
#include <ctime>
#include <nlohmann/json.hpp>

#include "base/fault.hpp"
#include "base/log.hpp"

namespace upcycle {
namespace {

using Json = nlohmann::ordered_json;

std::string utc_now() {
  const std::time_t now = std::time(nullptr);
  std::tm parts{};
  gmtime_r(&now, &parts);
  char out[32];
  std::strftime(out, sizeof out, "%Y-%m-%dT%H:%M:%SZ", &parts);
  return out;
}

template <class... Values>
std::string format(const char* pattern, Values... values) {
  char out[256];
  std::snprintf(out, sizeof out, pattern, values...);
  return out;
}

std::string duration(double seconds) {
  const int64_t s = std::llround(seconds);
  if (s >= 3600) return format("%ldh%02ldm", static_cast<long>(s / 3600), static_cast<long>(s / 60 % 60));
  if (s >= 60) return format("%ldm%02lds", static_cast<long>(s / 60), static_cast<long>(s % 60));
  return format("%lds", static_cast<long>(s));
}

std::string bar(int64_t done, int64_t all) {
  constexpr int64_t kWidth = 24;
  const int64_t filled = all > 0 ? kWidth * done / all : kWidth;
  return "[" + std::string(filled, '#') + std::string(kWidth - filled, '.') + "]";
}

// JSON has no NaN; null says "no number".
Json number(double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); }

}  // namespace

Metrics::Metrics(const RunConfig& config, const std::filesystem::path& directory, int rank, int ranks, Scale scale,
                 const TrainingState& state)
    : config_(config), scale_(scale), speaks_(rank == 0) {
  if (!speaks_) return;
  path_ = directory / "metrics.jsonl";
  file_.open(path_, std::ios::app);
  if (!file_) throw LonelyMistake(text("can't write ", path_.string(), ": check that the run directory is writable"));
  write(Json{{"kind", "start"},
             {"step", state.step},
             {"tokens", state.position * config.train.sequence},
             {"time", utc_now()},
             {"ranks", ranks},
             {"name", config.run.name}}
            .dump());
}

void Metrics::write(const std::string& line) {
  file_ << line << '\n' << std::flush;
  if (!file_) throw LonelyMistake(text("can't write ", path_.string(), ": is the disk full?"));
}

double Metrics::tokens_per_second() const {
  const double tokens = static_cast<double>(trained_steps_ * config_.train.global_batch * config_.train.sequence);
  return trained_seconds_ > 0 ? tokens / trained_seconds_ : 0.0;
}

void Metrics::step(const StepReport& report, double seconds) {
  last_loss_ = report.loss;
  trained_seconds_ += seconds;
  recent_seconds_ = trained_steps_ == 0 ? seconds : 0.9 * recent_seconds_ + 0.1 * seconds;
  ++trained_steps_;
  if (!speaks_) return;
  const double rate = static_cast<double>(config_.train.global_batch * config_.train.sequence) / seconds;
  Json line{{"kind", "step"},
            {"step", report.step},
            {"tokens", report.position * config_.train.sequence},
            {"loss", number(report.loss)},
            {"lr", report.lr},
            {"grad_norm", number(report.gradient_norm)},
            {"tokens_per_second", rate},
            {"tflops", rate * scale_.flops_per_token / 1e12},
            {"seconds", seconds},
            {"skipped", report.skipped}};
  if (report.learned) line["learned_tokens"] = *report.learned;
  if (!report.tokens_per_expert.empty()) {
    line["aux_loss"] = number(report.aux_loss);
    line["z_loss"] = number(report.z_loss);
    line["router_entropy"] = number(report.router_entropy);
    line["load_max_over_mean"] = report.load_max_over_mean;
    line["dead_experts"] = report.dead_experts;
    line["dropped"] = report.dropped;
    line["tokens_per_expert"] = report.tokens_per_expert;
  }
  write(line.dump());
  print(report, rate);
}

void Metrics::print(const StepReport& report, double rate) {
  const int64_t steps = config_.train.steps;
  std::string line = format("step %*ld/%ld  loss %.4f  lr %.2e  grad %.3f  %s tok/s", static_cast<int>(std::to_string(steps).size()),
                            static_cast<long>(report.step), static_cast<long>(steps), report.loss, report.lr,
                            report.gradient_norm, format(rate >= 1e4 ? "%.1fk" : "%.0f", rate >= 1e4 ? rate / 1e3 : rate).c_str());
  const double flops = rate * scale_.flops_per_token;
  line += format(flops >= 1e12 ? "  %.1f TFLOP/s" : "  %.4f TFLOP/s", flops / 1e12);
  if (scale_.peak_flops > 0) line += format("  MFU %.1f%%", 100.0 * flops / scale_.peak_flops);
  if (!report.tokens_per_expert.empty()) line += format("  load %.2f  entropy %.2f", report.load_max_over_mean, report.router_entropy);
  if (report.dead_experts > 0) line += format("  dead %ld", static_cast<long>(report.dead_experts));
  if (report.dropped > 0) line += format("  dropped %ld", static_cast<long>(report.dropped));
  line += "  ETA " + duration(recent_seconds_ * static_cast<double>(steps - report.step));
  if (report.step % config_.log.every == 0 || report.step == steps) {
    log::info(line);
  } else {
    log::progress(bar(report.step, steps) + " " + line);
  }
  if (report.skipped) {
    log::warning(text("step ", report.step, ": the gradient was not finite; the step was skipped (train.nan_policy)"));
  }
}

void Metrics::validation(int64_t step, int64_t position, double loss) {
  if (!speaks_) return;
  write(Json{{"kind", "validation"}, {"step", step}, {"tokens", position * config_.train.sequence}, {"loss", number(loss)}}.dump());
  log::info(format("step %ld  validation loss %.4f  perplexity %.2f", static_cast<long>(step), loss, std::exp(loss)));
}

void Metrics::memory(int64_t step, const Memory& memory) {
  if (!speaks_) return;
  write(Json{{"kind", "memory"}, {"step", step}, {"peak_bytes", memory.peak}, {"planned_bytes", memory.planned},
             {"device_bytes", memory.device}}.dump());
  const auto gib = [](int64_t bytes) { return static_cast<double>(bytes) / (1 << 30); };
  log::info(format("peak memory %.2f GiB of %.1f (plan: %.2f in tensors)", gib(memory.peak), gib(memory.device), gib(memory.planned)));
}

}  // namespace upcycle
