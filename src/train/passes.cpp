#include "train/passes.hpp"

#include "base/error.hpp"

namespace upcycle {

std::vector<Passes> passes_of(const RunConfig& config, const Sampler& train) {
  const double all = static_cast<double>(config.train.steps) * static_cast<double>(config.train.global_batch);
  std::vector<Passes> out;
  for (const Sampler::DataSet& data : train.data_sets()) out.push_back({data.prefix, data.share * all, data.samples, data.masked});
  return out;
}

std::string too_many_passes(const RunConfig& config, const Sampler& train) {
  const double epochs = config.data.epochs;
  const int64_t batch = config.train.global_batch, all = config.train.steps * batch;
  if (epochs == 0.0) return "";
  const int64_t most = train.within(epochs, all);
  if (most == all) return "";
  std::string lines;
  const std::vector<Sampler::DataSet> data = train.data_sets();
  for (size_t d = 0; d < data.size(); ++d) {
    const int64_t drawn = train.drawn(d, all);
    const double passes = static_cast<double>(drawn) / static_cast<double>(data[d].samples);
    if (data[d].samples > 0 && passes > epochs) {
      lines += text("\n  ", data[d].prefix, " has ", data[d].samples, " samples of train.sequence = ", config.train.sequence, "; the run draws ",
                    drawn, ", ", passes, " passes");
    }
  }
  return text("data.epochs = ", epochs, ", but train.steps = ", config.train.steps, " of train.global_batch = ", batch,
              " samples pass over data more often:", lines, "\nAt most train.steps = ", most / batch, " keeps to it; or raise data.epochs (0: no limit)");
}

}  // namespace upcycle
