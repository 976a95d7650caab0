#include "data/sampler.hpp"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "base/error.hpp"
#include "data/blend_schedule.hpp"
#include "data/mock_stream.hpp"
#include "data/shuffled_documents.hpp"

// B samples of a batch, S tokens of a sample
namespace upcycle {
namespace {

std::string describe(const std::array<int64_t, 3>& split) {
  return text("[", split[0], ", ", split[1], ", ", split[2], "]");
}

/// Row b; empty where there is no tensor.
template <class T>
std::span<T> row_of(const Tensor& x_BS, int64_t b) {
  if (!x_BS.defined()) return {};
  return {x_BS.mutable_data_ptr<T>() + b * x_BS.size(1), static_cast<size_t>(x_BS.size(1))};
}

/// Whole samples in so many passes; a product that only rounding keeps from being whole is whole.
int64_t samples_in(double epochs, int64_t samples) {
  const double product = epochs * static_cast<double>(samples), nearest = std::round(product);
  return static_cast<int64_t>(std::abs(product - nearest) <= 1e-15 * product ? nearest : std::floor(product));
}

}  // namespace

const char* split_name(Split part) {
  return part == Split::train ? "train" : part == Split::validation ? "validation" : "test";
}

std::pair<int64_t, int64_t> documents_of(Split part, const std::array<int64_t, 3>& split, int64_t documents) {
  if (*std::min_element(split.begin(), split.end()) < 0 || split == std::array<int64_t, 3>{}) {
    fail("[data].split = ", describe(split), ": shares of train, validation and test are not negative, and not all 0");
  }
  const auto sum = static_cast<double>(split[0] + split[1] + split[2]);
  std::array<double, 4> border = {};
  for (int i = 0; i < 3; ++i) border[i + 1] = border[i] + static_cast<double>(split[i]) / sum;
  const auto at = [&](int i) {  // nearbyint rounds half to even, as Python's round does
    return std::min(documents, static_cast<int64_t>(std::nearbyint(border[i] * static_cast<double>(documents))));
  };
  const int i = static_cast<int>(part);
  return {at(i), at(i + 1)};
}

struct Sampler::State {
  BlendSchedule schedule;
  std::vector<std::string> prefixes;
  std::vector<std::unique_ptr<Source>> sources;
  int64_t sequence;
  Borders borders;
};

Sampler::Sampler(const std::vector<Blend>& blend, const std::array<int64_t, 3>& split, Split part, int64_t sequence,
                 int64_t vocab, uint64_t seed, Borders borders)
    : state_(new State{BlendSchedule(blend), {}, {}, sequence, borders}) {
  for (size_t place = 0; place < blend.size(); ++place) {
    const std::string name = text("data/", place);
    state_->prefixes.push_back(blend[place].prefix);
    if (blend[place].prefix == "mock") {
      state_->sources.push_back(std::make_unique<MockStream>(sequence, vocab, Random(seed, name + "/mock/" + split_name(part))));
      continue;
    }
    IndexedDataset data(blend[place].prefix);
    const auto [begin, end] = documents_of(part, split, data.documents());
    state_->sources.push_back(
        std::make_unique<ShuffledDocuments>(std::move(data), begin, end, sequence, vocab, seed, name,
                                            text(split_name(part), " share of split ", describe(split))));
  }
}

Sampler::Sampler(Sampler&&) noexcept = default;
Sampler::~Sampler() = default;

Batch Sampler::batch(int64_t first, int64_t count) const {
  if (first < 0 || count < 0) throw std::out_of_range(text("samples ", first, " to ", first + count));
  const int64_t S = state_->sequence;
  Batch batch{at::empty({count, S}, at::kLong), at::empty({count, S}, at::kLong), {}};
  if (state_->borders == Borders::packed) batch.starts_BS = at::empty({count, S}, at::kLong);
  if (masked()) batch.learn_BS = at::empty({count, S}, at::kBool);
  auto* tokens = batch.tokens_BS.mutable_data_ptr<int64_t>();
  auto* labels = batch.labels_BS.mutable_data_ptr<int64_t>();
  std::vector<int64_t> sample(S + 1);
  for (int64_t b = 0; b < count; ++b) {
    const auto [dataset, index] = state_->schedule.at(first + b);
    state_->sources[dataset]->sample(index, {sample, row_of<int64_t>(batch.starts_BS, b), row_of<bool>(batch.learn_BS, b)});
    std::copy_n(sample.begin(), S, tokens + b * S);
    std::copy_n(sample.begin() + 1, S, labels + b * S);
  }
  return batch;
}

bool Sampler::masked() const noexcept {
  return std::any_of(state_->sources.begin(), state_->sources.end(), [](const auto& source) { return source->masked(); });
}

int64_t Sampler::learned(int64_t first, int64_t count) const {
  if (!masked()) return count * state_->sequence;
  int64_t labels = 0;
  for (int64_t i = first; i < first + count; ++i) {
    const auto [dataset, index] = state_->schedule.at(i);
    labels += state_->sources[dataset]->learned(index);
  }
  return labels;
}

void Sampler::check(int64_t vocab) const {
  for (const auto& source : state_->sources) source->check(vocab);
}

int64_t Sampler::tokens() const noexcept {
  int64_t sum = 0;
  for (const auto& source : state_->sources) sum += source->tokens();
  return sum;
}

int64_t Sampler::samples() const noexcept {
  int64_t sum = 0;
  for (const auto& source : state_->sources) sum += source->samples();
  return sum;
}

std::vector<Sampler::DataSet> Sampler::data_sets() const {
  std::vector<DataSet> out;
  for (size_t d = 0; d < state_->sources.size(); ++d) {
    const Source& source = *state_->sources[d];
    out.push_back({state_->prefixes[d], state_->schedule.share(static_cast<int64_t>(d)), source.samples(), source.masked()});
  }
  return out;
}

int64_t Sampler::drawn(size_t place, int64_t count) const { return state_->schedule.drawn(static_cast<int64_t>(place), count); }

int64_t Sampler::within(double epochs, int64_t count) const {
  int64_t most = count;
  for (size_t d = 0; d < state_->sources.size(); ++d) {
    const int64_t samples = state_->sources[d]->samples(), dataset = static_cast<int64_t>(d);
    if (samples == 0) continue;   // never repeats itself
    const int64_t limit = samples_in(epochs, samples);
    // The place of a sample that is far away takes time to find.
    if (state_->schedule.most(dataset, count) > limit) most = std::min(most, state_->schedule.position_of(dataset, limit));
  }
  return most;
}

}  // namespace upcycle
