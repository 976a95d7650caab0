#include "model/stage.hpp"

#include "ops/cross_entropy.hpp"
#include "ops/embedding.hpp"
#include "ops/linear.hpp"
#include "ops/rms_norm.hpp"

namespace upcycle {

Stage::Stage(const Architecture& architecture, const Layout& layout, const Mesh& mesh)
    : weights_(architecture, layout, mesh.here()) {
  const int here = mesh.here()[Axis::pipeline], last = layout.grid.size(Axis::pipeline) - 1;
  if (here == 0 || (here == last && architecture.tied)) embedding_ = &weights_.add({"model.embed_tokens.weight"});
  for (int64_t layer = 0; layer < architecture.layers; ++layer) {
    if (layout.stage_of_layer[layer] == here) blocks_.emplace_back(weights_, mesh, layer);
  }
  if (here == last) {
    final_norm_ = &weights_.add({"model.norm.weight"});
    head_ = architecture.tied ? embedding_ : &weights_.add({"lm_head.weight"});
  }
}

Tensor Stage::embed(const Tensor& tokens_BS) { return embedding(tokens_BS, *embedding_); }

Tensor Stage::blocks(const Tensor& x_BSW, const BalanceLoss& balance) {
  const RotaryTable& table = rotary(x_BSW.size(1));
  Tensor x = x_BSW;
  for (Block& block : blocks_) x = block.forward(x, table, balance);
  return x;
}

Tensor Stage::logits(const Tensor& x_BSW) {
  const Tensor normed = rms_norm(x_BSW, *final_norm_, architecture().rms_eps);
  return linear(normed.reshape({-1, normed.size(-1)}), *head_);
}

Tensor Stage::token_losses(const Tensor& x_BSW, const Tensor& labels_BS) {
  return cross_entropy(logits(x_BSW), labels_BS.reshape({-1}));
}

const RotaryTable& Stage::rotary(int64_t positions) {
  const at::Device device = weights_.all().front().parameter.value.device();
  if (!rotary_.cos_SD.defined() || rotary_.cos_SD.size(0) != positions || rotary_.cos_SD.device() != device) {
    rotary_ = rotary_table(positions, architecture().head_dim, architecture().rope_theta, device);
  }
  return rotary_;
}

std::vector<Router*> Stage::routers() {
  std::vector<Router*> routers;
  for (Block& block : blocks_) {
    if (MoeLayer* moe = block.moe()) routers.push_back(&moe->router());
  }
  return routers;
}

}  // namespace upcycle
