#include "train/run_summary.hpp"

#include <algorithm>
#include <cmath>

#include "base/error.hpp"
#include "base/exit_code.hpp"
#include "train/words.hpp"

namespace upcycle {
namespace {

using Steps = std::vector<RunHistory::Step>;

template <class Number>
std::vector<double> finite(const Steps& steps, Number number) {
  std::vector<double> out;
  for (const RunHistory::Step& step : steps) {
    if (const double value = number(step); std::isfinite(value)) out.push_back(value);
  }
  return out;
}

double median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// "12.1 GiB", "3 MiB"
std::string binary(int64_t bytes) {
  const auto number = static_cast<double>(bytes);
  return bytes >= (int64_t{1} << 30) ? format("%.2f GiB", number / (1 << 30)) : format("%.0f MiB", number / (1 << 20));
}

std::string of_time(const RunHistory& history, const RunEnd& end) {
  double all = end.seconds;   // the last start has no end line yet
  for (size_t i = 0; i + 1 < history.starts().size(); ++i) all += history.starts()[i].seconds;
  const size_t starts = history.starts().size();
  return starts > 1 ? text(duration(all), " in ", starts, " starts, ", duration(end.seconds), " in this one") : duration(all);
}

std::string of_speed(const std::vector<double>& rates, const Scale& scale) {
  const double rate = median(rates), flops = rate * scale.flops_per_token;
  std::string out = text(with_commas(std::llround(rate)), " tokens/s (the median step), ", tflops(flops));
  if (scale.peak_flops > 0) out += format(", %.1f %% of the peak", 100.0 * flops / scale.peak_flops);
  return out;
}

std::string of_loss(const Steps& steps) {
  const auto known = [](const RunHistory::Step& step) { return std::isfinite(step.loss); };
  const auto first = std::find_if(steps.begin(), steps.end(), known);
  if (first == steps.end()) return "";
  const auto last = std::find_if(steps.rbegin(), steps.rend(), known);
  if (first->step == last->step) return format("%.4f at step %ld", first->loss, static_cast<long>(first->step));
  return format("%.4f at step %ld -> %.4f at step %ld", first->loss, static_cast<long>(first->step), last->loss, static_cast<long>(last->step));
}

std::string of_validation(const std::vector<RunHistory::Validation>& validations) {
  std::vector<RunHistory::Validation> known;
  for (const RunHistory::Validation& one : validations) {
    if (std::isfinite(one.loss)) known.push_back(one);
  }
  if (known.empty()) return "";
  const RunHistory::Validation &first = known.front(), &last = known.back();
  if (known.size() == 1) return format("%.4f at step %ld", first.loss, static_cast<long>(first.step));
  const auto best = std::min_element(known.begin(), known.end(), [](const auto& a, const auto& b) { return a.loss < b.loss; });
  return format("%.4f at step %ld -> %.4f at step %ld", first.loss, static_cast<long>(first.step), last.loss, static_cast<long>(last.step)) +
         (best->step == last.step ? ", the best" : format(", best %.4f at step %ld", best->loss, static_cast<long>(best->step)));
}

std::string of_experts(const RunHistory::Step& last, int64_t experts) {
  return format("fullest / mean %.2f, %ld dead, router entropy %.2f of at most %.2f nats", last.load_max_over_mean,
                static_cast<long>(last.dead_experts), last.router_entropy, std::log(static_cast<double>(experts)));
}

std::string of_health(const RunHistory::Experts& last) {
  std::string out;
  const auto tell = [&](double value, const char* pattern) {
    if (std::isfinite(value)) out += (out.empty() ? "" : ", ") + format(pattern, value);
  };
  tell(last.cosine_between, "cosine %.4f between copies");
  tell(last.cosine_inside, "%.4f inside them");
  if (out.empty()) tell(last.cosine, "cosine %.4f between experts");
  tell(last.distance, "%.4f from their source");
  return out;
}

}  // namespace

std::string summarize(const RunHistory& history, const RunEnd& end) {
  const bool stopped = end.step < end.steps;
  const Steps& steps = history.steps();
  const int64_t tokens = steps.empty() ? 0 : steps.back().tokens;
  std::string out = stopped ? text("stopped on request after step ", end.step, " of ", end.steps, ": ", end.name)
                            : text("done: ", end.name, ", ", end.step, " steps");
  const auto row = [&](const char* what, const std::string& value) {
    if (!value.empty()) out += format("\n  %-14s ", what) + value;
  };
  row("tokens", text(with_commas(tokens), end.skipped > 0 ? text("; ", end.skipped, end.skipped == 1 ? " step" : " steps", " skipped (gradient not finite, or loss a spike)") : ""));
  row("time", of_time(history, end));
  const std::vector<double> rates = finite(steps, [](const RunHistory::Step& s) { return s.tokens_per_second; });
  if (!rates.empty()) row("speed", of_speed(rates, end.scale));
  row("loss", of_loss(steps));
  row("validation", of_validation(history.validations()));
  if (!stopped) {
    const std::vector<double> norms = finite(steps, [](const RunHistory::Step& s) { return s.gradient_norm; });
    if (!norms.empty()) {
      const auto [least, most] = std::minmax_element(norms.begin(), norms.end());
      row("gradient norm", format("%.3g to %.3g, median %.3g", *least, *most, median(norms)));
    }
    if (end.experts > 0 && !steps.empty()) row("experts", of_experts(steps.back(), end.experts));
    if (!history.experts().empty()) row("expert weights", of_health(history.experts().back()));
    row("peak memory", text(binary(end.memory.peak), " of ", binary(end.memory.device), " on the fullest rank; planned in tensors: ",
                            binary(end.memory.planned)));
  }
  row("checkpoint", end.checkpoint.string());
  if (stopped) return out + format("\n  %-14s the same command goes on from here (exit code %d)", "next", kExitRequeue);
  row("next", text("upcycle export ", end.directory.string(), " DIRECTORY      for transformers and vLLM"));
  row("", text("tools/plots ", end.directory.string(), " --out ", (end.directory / "plots").string()));
  if (end.tensorboard) row("", text("tensorboard --logdir ", (end.directory / "tensorboard").string()));
  return out;
}

}  // namespace upcycle
