#include "model/stage.hpp"

#include <ATen/ops/empty.h>

#include <stdexcept>

#include "base/trace_range.hpp"
#include "model/vocabulary.hpp"
#include "ops/linear.hpp"
#include "ops/rms_norm.hpp"
#include "parallel/regions.hpp"

namespace upcycle {

Stage::Stage(const Architecture& architecture, const Layout& layout, const Mesh& mesh, const ModelSettings& settings)
    : tensor_(mesh.along(Axis::tensor)), context_(mesh.along(Axis::context)), weights_(architecture, layout, mesh.here()) {
  const int here = mesh.here()[Axis::pipeline], last = layout.stages() - 1;
  if (here == 0 || (here == last && architecture.tied)) embedding_ = vocabulary("model.embed_tokens.weight");
  for (int64_t layer = 0; layer < architecture.layers; ++layer) {
    if (layout.stage_of(layer) == here) blocks_.emplace_back(weights_, mesh, layer, settings);
  }
  if (here == last) {
    final_norm_ = &weights_.add({"model.norm.weight"});
    head_ = architecture.tied ? embedding_ : vocabulary("lm_head.weight");
  }
}

Parameter* Stage::vocabulary(const std::string& name) {
  Parameter* parameter = &weights_.add({name});
  first_token_ = weights_.all().back().parts.front().box.begin[0];
  return parameter;
}

Positions Stage::positions(int64_t sequences, int64_t held, const Tensor& starts_BS) {
  const at::Device device = weights_.all().front().parameter.value.device();
  const int ranks = context_.size(), rank = context_.rank();
  const int64_t length = held * ranks;
  if (!rotary_.cos_SD.defined() || rotary_.cos_SD.size(0) != held || rotary_.cos_SD.device() != device) {
    const RotaryTable whole = rotary_table(length, architecture().head_dim, architecture().rope_theta, device);
    const auto mine = [&](const Tensor& x_SD) { return take_zigzag(x_SD.unsqueeze(0), ranks, rank).squeeze(0); };
    rotary_ = {mine(whole.cos_SD), mine(whole.sin_SD)};
  }
  // Positions count from the beginning of the sample also inside packed documents: rotary attention sees only their differences.
  return {sequences, rotary_, segments_of(sequences, length, zigzag(length, ranks, rank), starts_BS, device)};
}

Positions Stage::positions_after(KeyValues& before, int64_t sequences, int64_t held) {
  if (context_.size() > 1) throw std::logic_error("keys and values of earlier positions are kept where sequences are whole");
  const at::Device device = weights_.all().front().parameter.value.device();
  const int64_t room = before.room(), begin = before.length(), end = begin + held;
  if (!rotary_.cos_SD.defined() || rotary_.cos_SD.size(0) != room || rotary_.cos_SD.device() != device) {
    rotary_ = rotary_table(room, architecture().head_dim, architecture().rope_theta, device);
  }
  const RotaryTable mine = {rotary_.cos_SD.narrow(0, begin, held), rotary_.sin_SD.narrow(0, begin, held)};
  return {sequences, mine, segments_of(sequences, end, {{begin, end}}, {}, device), &before};
}

Tensor Stage::embed(const Tensor& tokens_BS) {
  const TraceRange range("embedding");
  return embed_tokens(tensor_, tokens_BS, *embedding_, first_token_);
}

Tensor Stage::blocks(const Tensor& x_TW, const Positions& positions, const RouterContext& context, int chunk) {
  Tensor x = x_TW;
  for (Block& block : blocks_) {
    if (weights_.layout().chunk_of_layer[static_cast<size_t>(block.layer())] == chunk) x = block.forward(x, positions, context);
  }
  return x;
}

Tensor Stage::room(int64_t positions) const {
  // The first weight is the embedding or a norm: of the compute dtype.
  return at::empty({positions / tensor_.size(), architecture().hidden}, weights_.all().front().parameter.value.options());
}

Tensor Stage::before_head(const Tensor& x_TW) {
  return gather_along(tensor_, rms_norm(x_TW, *final_norm_, architecture().rms_eps), 0);
}

Tensor Stage::loss(const Tensor& x_TW, const Tensor& labels_BS, const Tensor& weight_BS) {
  const TraceRange range("loss");
  return vocabulary_loss(tensor_, before_head(x_TW), *head_, labels_BS.reshape({-1}), weight_BS.reshape({-1}), first_token_, architecture().vocab);
}

Tensor Stage::logits(const Tensor& x_TW) {
  return whole_logits(tensor_, linear(before_head(x_TW), *head_), first_token_, architecture().vocab);
}

std::vector<Router*> Stage::routers() {
  std::vector<Router*> routers;
  for (Block& block : blocks_) {
    if (MoeLayer* moe = block.moe()) routers.push_back(&moe->router());
  }
  return routers;
}

}  // namespace upcycle
