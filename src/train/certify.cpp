#include "train/certify.hpp"

#include <ATen/ops/cat.h>

#include <algorithm>

#include "base/autograd.hpp"
#include "base/dtype.hpp"
#include "base/error.hpp"
#include "base/log.hpp"
#include "ops/linear.hpp"
#include "ops/swiglu.hpp"
#include "train/context_batch.hpp"

// Shapes: T token rows of this rank, W width of the model, N experts, F dense width.
namespace upcycle {
namespace {

// The dense model's feed-forward of one layer, read for as long as this lives.
class DenseFeedForward {
 public:
  DenseFeedForward(const Recipe& recipe, const ReadDense& read, int64_t layer, const Tensor& like) {
    const std::string prefix = "model.layers." + std::to_string(layer) + ".mlp.";
    const int64_t width = recipe.dense.ffn, hidden = recipe.dense.hidden;
    const auto load = [&](const char* name, const Shape& shape) {
      Parameter p;
      p.value = read(prefix + name + ".weight", whole(shape)).to(like.options());
      return p;
    };
    gate_ = load("gate_proj", {width, hidden});
    up_ = load("up_proj", {width, hidden});
    down_ = load("down_proj", {hidden, width});
  }
  Tensor forward(const Tensor& x_TW) {
    const Tensor gate_up = at::cat({linear(x_TW, gate_), linear(x_TW, up_)}, -1);
    return linear(swiglu(gate_up), down_);
  }

 private:
  Parameter gate_, up_, down_;
};

// Both models side by side, layer by layer. They share all weights but the feed-forwards, so the dense one needs only those. Each
// rank of a tensor group judges its own rows; the logits, which all of them get whole, count on one (`counts_logits`).
FunctionLevel compare(Stage& stage, bool counts_logits, const Recipe& recipe, const ReadDense& read, const Batch& batch,
                      const std::function<void()>& alive) {
  const Tensor embedded = stage.embed(batch.tokens_BS);
  const Positions positions = stage.positions(batch.tokens_BS.size(0), batch.tokens_BS.size(1), batch.starts_BS);
  FunctionLevel level;
  level.precision = long_name(embedded.scalar_type());
  Tensor dense = embedded, moe = embedded;
  for (Block& block : stage.layers()) {
    alive();
    log::progress(text("certificate, ", level.precision, ": layer ", block.layer() + 1, "/", recipe.moe.layers));
    dense = block.attend(dense, positions);
    moe = block.attend(moe, positions);
    const Tensor dense_input = block.feed_forward_input(dense), moe_input = block.feed_forward_input(moe);
    if (MoeLayer* layer = block.moe()) {
      DenseFeedForward feed_forward(recipe, read, block.layer(), embedded);
      const Tensor expected = feed_forward.forward(dense_input);
      level.layers[block.layer()].add(expected, block.feed_forward(dense_input, {}));
      dense = dense + expected;
      const Tensor logits_TN = layer->router().logits(moe_input);
      level.routing.add(logits_TN, choose_experts(logits_TN, recipe.moe.top_k), recipe.granularity);
    } else {
      dense = dense + block.feed_forward(dense_input, {});
    }
    moe = moe + block.feed_forward(moe_input, {});
  }
  const Tensor dense_logits = stage.logits(dense), moe_logits = stage.logits(moe);
  if (counts_logits) level.add_logits(dense_logits, moe_logits, batch.labels_BS.reshape({-1}));
  return level;
}

}  // namespace

Certificate certify(Stage& stage, const Mesh& mesh, const Recipe& recipe, const ReadDense& read, const Sampler& tokens,
                    const RunConfig& config, const std::function<void()>& alive) {
  const Unrecorded guard;
  Certificate certificate(recipe);
  for (const Weight& weight : stage.weights().all()) {
    alive();
    for (const Part& part : weight.parts) {
      certificate.weights.check(part.spec, part.box, part.of(weight.parameter.master).cpu(), recipe, read);
    }
  }

  // Every data rank looks at sequences of its own; all ranks of an expert group take part in each exchange.
  const at::Device device = stage.weights().all().front().parameter.value.device();
  const int64_t tensor = mesh.grid().size(Axis::tensor);
  const int64_t context = mesh.grid().size(Axis::context);
  const int64_t pieces = tensor * (context > 1 ? 2 * context : 1);   // what train.sequence is a multiple of
  const int64_t length = std::min(config.train.sequence, (config.upcycle.certify_tokens + pieces - 1) / pieces * pieces);
  const int64_t data = mesh.grid().size(Axis::data);
  const int64_t sequences = std::max<int64_t>(1, config.upcycle.certify_tokens / (length * data));
  const Batch all = tokens.batch(mesh.here()[Axis::data] * sequences, sequences);
  const auto prefix = [&](const Tensor& x_BS) { return x_BS.defined() ? x_BS.narrow(1, 0, length).contiguous() : x_BS; };
  const Batch mine = of_context_rank({prefix(all.tokens_BS), prefix(all.labels_BS), prefix(all.starts_BS)}, static_cast<int>(context),
                                     mesh.here()[Axis::context]);
  const Batch batch{mine.tokens_BS.to(device), mine.labels_BS.to(device), mine.starts_BS};
  const bool counts_logits = mesh.here()[Axis::tensor] == 0;
  {
    const ComputeWithMasters fp32(stage.weights());
    certificate.functions.push_back(compare(stage, counts_logits, recipe, read, batch, alive));
  }
  if (config.train.precision != Precision::fp32) {
    certificate.functions.push_back(compare(stage, counts_logits, recipe, read, batch, alive));
  }

  const std::vector<std::string> evidence = mesh.world().all_gather(certificate.pack());
  for (int rank = 0; rank < mesh.world().size(); ++rank) {
    if (rank != mesh.world().rank()) certificate.merge(evidence[rank]);
  }
  return certificate;
}

}  // namespace upcycle
