#include "train/metrics.hpp"

#include <cmath>
#include <ctime>
#include <nlohmann/json.hpp>

#include "base/fault.hpp"
#include "base/log.hpp"
#include "train/words.hpp"

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

std::string bar(int64_t done, int64_t all) {
  constexpr int64_t kWidth = 24;
  const int64_t filled = all > 0 ? kWidth * done / all : kWidth;
  return "[" + std::string(filled, '#') + std::string(kWidth - filled, '.') + "]";
}

// JSON has no NaN; null says "no number".
Json number(double value) { return std::isfinite(value) ? Json(value) : Json(nullptr); }

template <class Of>
Json column(const std::vector<LayerHealth>& layers, Of of) {
  Json out = Json::array();
  for (const LayerHealth& layer : layers) out.push_back(of(layer));
  return out;
}

}  // namespace

Metrics::Metrics(const RunConfig& config, const std::filesystem::path& directory, int rank, std::vector<std::string> hosts,
                 Scale scale, const TrainingState& state)
    : config_(config), scale_(scale), speaks_(rank == 0), directory_(directory), path_(directory / "metrics.jsonl") {
  if (!speaks_) return;
  size_ = history_.read(path_);
  file_.open(path_, std::ios::app);
  if (!file_) throw LonelyMistake(text("can't write ", path_.string(), ": check that the run directory is writable"));
  write({{"kind", "start"},
         {"step", state.step},
         {"tokens", state.position * config.train.sequence},
         {"time", utc_now()},
         {"ranks", hosts.size()},
         {"name", config.run.name}});
  stragglers_ = Stragglers(std::move(hosts));
  // What a run tells at step 0 it tells again when it starts there again.
  if (config.log.tensorboard) events_.emplace(directory / "tensorboard", state.step == 0 ? 0 : state.step + 1);
}

void Metrics::write(const Json& line) {
  const std::string written = line.dump() + '\n';
  file_ << written << std::flush;
  if (!file_) throw LonelyMistake(text("can't write ", path_.string(), ": is the disk full?"));
  history_.add(line, size_);
  size_ += static_cast<int64_t>(written.size());
}

void Metrics::step(const StepReport& report, double seconds, int64_t gpu_memory) {
  recent_seconds_ = recent_seconds_ < 0 ? seconds : 0.9 * recent_seconds_ + 0.1 * seconds;
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
  if (gpu_memory > 0) line["peak_bytes"] = gpu_memory;
  if (report.spike) line["spike"] = true;
  if (report.learned) line["learned_tokens"] = *report.learned;
  std::vector<Scalar> scalars{{"train/loss", report.loss},
                              {"train/learning_rate", report.lr},
                              {"train/gradient_norm", report.gradient_norm},
                              {"speed/tokens_per_second", rate},
                              {"speed/tflops", rate * scale_.flops_per_token / 1e12}};
  if (!report.tokens_per_expert.empty()) {
    line["aux_loss"] = number(report.aux_loss);
    line["z_loss"] = number(report.z_loss);
    line["router_entropy"] = number(report.router_entropy);
    line["load_max_over_mean"] = report.load_max_over_mean;
    line["dead_experts"] = report.dead_experts;
    line["dropped"] = report.dropped;
    Json& entropies = line["router_entropy_by_layer"] = Json::array();
    for (const double entropy : report.router_entropy_of_layer) entropies.push_back(number(entropy));
    line["tokens_per_expert"] = report.tokens_per_expert;
    scalars.insert(scalars.end(), {{"balance/aux_loss", report.aux_loss},
                                   {"balance/z_loss", report.z_loss},
                                   {"balance/router_entropy", report.router_entropy},
                                   {"balance/load_max_over_mean", report.load_max_over_mean},
                                   {"balance/dead_experts", static_cast<double>(report.dead_experts)},
                                   {"balance/dropped", static_cast<double>(report.dropped)}});
  }
  stragglers_.add(report.own_seconds);
  std::optional<Stragglers::Slowest> slowest;
  if (is_told(report.step)) slowest = stragglers_.take();
  if (slowest) {
    line["slowest_rank"] = {{"rank", slowest->rank}, {"host", slowest->host}, {"seconds", slowest->seconds}, {"over_median", slowest->over_median}};
    line["seconds_of_rank"] = slowest->seconds_of_rank;
  }
  write(line);
  if (events_) events_->add(report.step, scalars);
  print(report, rate, slowest);
}

bool Metrics::is_told(int64_t step) const { return step % config_.log.every == 0 || step == config_.train.steps; }

void Metrics::print(const StepReport& report, double rate, const std::optional<Stragglers::Slowest>& slowest) {
  const int64_t steps = config_.train.steps;
  std::string line = format("step %*ld/%ld  loss %.4f  lr %.2e  grad %.3f  %s tok/s", static_cast<int>(std::to_string(steps).size()),
                            static_cast<long>(report.step), static_cast<long>(steps), report.loss, report.lr,
                            report.gradient_norm, format(rate >= 1e4 ? "%.1fk" : "%.0f", rate >= 1e4 ? rate / 1e3 : rate).c_str());
  const double flops = rate * scale_.flops_per_token;
  line += "  " + tflops(flops);
  if (scale_.peak_flops > 0) line += format("  MFU %.1f%%", 100.0 * flops / scale_.peak_flops);
  if (!report.tokens_per_expert.empty()) line += format("  load %.2f  entropy %.2f", report.load_max_over_mean, report.router_entropy);
  if (report.dead_experts > 0) line += format("  dead %ld", static_cast<long>(report.dead_experts));
  if (report.dropped > 0) line += format("  dropped %ld", static_cast<long>(report.dropped));
  if (slowest) line += format("  slowest rank %d (%s) %.2fx", slowest->rank, slowest->host.c_str(), slowest->over_median);
  line += "  ETA " + duration(recent_seconds_ * static_cast<double>(steps - report.step));
  if (is_told(report.step)) {
    log::info(line);
  } else {
    log::progress(bar(report.step, steps) + " " + line);
  }
  if (report.skipped) {
    log::warning(report.spike ? format("step %ld: the loss, %.4f, is a spike; the step was skipped (train.spike)", static_cast<long>(report.step), report.loss)
                              : text("step ", report.step, ": the gradient was not finite; the step was skipped (train.nan_policy)"));
  }
}

void Metrics::validation(int64_t step, int64_t position, double loss) {
  if (!speaks_) return;
  write({{"kind", "validation"}, {"step", step}, {"tokens", position * config_.train.sequence}, {"loss", number(loss)}});
  if (events_) events_->add(step, {{"validation/loss", loss}});
  log::info(format("step %ld  validation loss %.4f  perplexity %.2f", static_cast<long>(step), loss, std::exp(loss)));
}

void Metrics::experts(int64_t step, int64_t position, const std::vector<LayerHealth>& layers) {
  if (!speaks_) return;
  const ExpertUse use = use_since_last_look(history_, path_);
  const bool has_copies = std::isfinite(layers.front().cosine_between), has_shards = std::isfinite(layers.front().cosine_inside);
  Json line{{"kind", "experts"},
            {"step", step},
            {"tokens", position * config_.train.sequence},
            {"steps", use.steps},
            {"layers", column(layers, [](const LayerHealth& layer) { return Json(layer.layer); })}};
  if (use.steps > 0) {
    line["load"] = use.load;
    line["dead"] = use.dead;
    Json& entropies = line["entropy"] = Json::array();
    for (const double entropy : use.entropy) entropies.push_back(number(entropy));
  }
  line["cosine"] = column(layers, [](const LayerHealth& layer) { return number(layer.cosine); });
  if (has_copies) line["cosine_between"] = column(layers, [](const LayerHealth& layer) { return number(layer.cosine_between); });
  if (has_shards) line["cosine_inside"] = column(layers, [](const LayerHealth& layer) { return number(layer.cosine_inside); });
  if (!layers.front().distance.empty()) {
    line["distance"] = column(layers, [](const LayerHealth& layer) {
      Json out = Json::array();
      for (const double distance : layer.distance) out.push_back(number(distance));
      return out;
    });
  }
  write(line);
  if (!events_) return;
  const RunHistory::Experts& means = history_.experts().back();
  std::vector<Scalar> scalars{{"experts/cosine", means.cosine}};
  if (has_copies) scalars.push_back({"experts/cosine_between_copies", means.cosine_between});
  if (has_shards) scalars.push_back({"experts/cosine_inside_copies", means.cosine_inside});
  if (line.contains("distance")) scalars.push_back({"experts/distance_to_dense", means.distance});
  if (use.steps > 0) {
    int64_t dead = 0;
    double entropy = 0.0;
    for (const int64_t of_layer : use.dead) dead += of_layer;
    for (const double of_layer : use.entropy) entropy += of_layer / static_cast<double>(use.entropy.size());
    scalars.push_back({"experts/dead", static_cast<double>(dead)});
    scalars.push_back({"experts/router_entropy", entropy});
  }
  events_->add(step, scalars);
}

void Metrics::rolled_back(const TrainingState& state, const BadSteps& bad) {
  if (!speaks_) return;
  write({{"kind", "rollback"},
         {"step", state.step},
         {"tokens", state.position * config_.train.sequence},
         {"time", utc_now()},
         {"from", bad.last()},
         {"bad_steps", bad.number()},
         {"why", bad.words()}});
  if (events_) events_.emplace(directory_ / "tensorboard", state.step + 1);   // readers forget what another file told of these steps
}

void Metrics::end(const TrainingState& state, const PeakMemory& memory, double seconds, int64_t experts,
                  const std::filesystem::path& checkpoint) {
  if (!speaks_) return;
  write({{"kind", "memory"},
         {"step", state.step},
         {"peak_bytes", memory.peak},
         {"planned_bytes", memory.planned},
         {"device_bytes", memory.device}});
  write({{"kind", "end"}, {"step", state.step}, {"time", utc_now()}, {"seconds", seconds}});
  log::info(summarize(history_, {.name = config_.run.name, .step = state.step, .steps = config_.train.steps, .skipped = state.skipped,
                                 .seconds = seconds, .scale = scale_, .memory = memory, .experts = experts, .directory = directory_,
                                 .checkpoint = checkpoint, .tensorboard = config_.log.tensorboard}));
}

}  // namespace upcycle
