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

// The token rows of both models, between two layers.
struct Streams {
  Tensor dense_TW, moe_TW;
};

// Both models side by side through one layer. They share all weights but the feed-forwards, so the dense one needs only those. Each
// rank judges its own rows.
Streams compare(Block& block, const Streams& x, const Positions& positions, const Recipe& recipe, const ReadDense& read, FunctionLevel& level) {
  Tensor dense = block.attend(x.dense_TW, positions), moe = block.attend(x.moe_TW, positions);
  const Tensor dense_input = block.feed_forward_input(dense), moe_input = block.feed_forward_input(moe);
  if (MoeLayer* layer = block.moe()) {
    DenseFeedForward feed_forward(recipe, read, block.layer(), dense_input);
    const Tensor expected = feed_forward.forward(dense_input);
    level.layers[block.layer()].add(expected, block.feed_forward(dense_input, {}));
    dense = dense + expected;
    const Tensor logits_TN = layer->router().logits(moe_input);
    level.routing.add(logits_TN, choose_experts(logits_TN, recipe.moe.top_k), recipe.granularity);
  } else {
    dense = dense + block.feed_forward(dense_input, {});
  }
  return {dense, moe + block.feed_forward(moe_input, {})};
}

// All layers in turn, wherever in the pipeline they are. A stage that has nothing to do waits layer by layer, so that it can say that it
// is alive. The logits, which all ranks of a tensor group get whole, count on one.
FunctionLevel compare(Stage& stage, const Mesh& mesh, const Recipe& recipe, const ReadDense& read, const Batch& batch,
                      const std::function<void()>& alive) {
  const Communicator& stages = mesh.along(Axis::pipeline);
  const Layout& layout = stage.weights().layout();
  const auto on = [&](int64_t layer) { return layout.stage_of(std::clamp<int64_t>(layer, 0, recipe.moe.layers - 1)); };
  const Positions positions = stage.positions(batch.tokens_BS.size(0), batch.tokens_BS.size(1), batch.starts_BS);
  const auto room = [&] { return stage.room(batch.tokens_BS.numel()); };
  FunctionLevel level;
  level.precision = long_name(room().scalar_type());
  Streams x;
  auto block = stage.layers().begin();
  for (int64_t layer = 0; layer < recipe.moe.layers; ++layer) {
    alive();
    log::progress(text("certificate, ", level.precision, ": layer ", layer + 1, "/", recipe.moe.layers));
    const int before = on(layer - 1), here = on(layer);
    if (before != here && before == stages.rank()) {
      stages.send_receive(std::vector<Communicator::Message>{{here, x.dense_TW.contiguous()}, {here, x.moe_TW.contiguous()}}, {});
    }
    if (here == stages.rank()) {
      if (layer == 0) x.dense_TW = x.moe_TW = stage.embed(batch.tokens_BS);
      if (before != here) {
        x = {room(), room()};
        stages.send_receive({}, std::vector<Communicator::Message>{{before, x.dense_TW}, {before, x.moe_TW}});
      }
      x = compare(*block++, x, positions, recipe, read, level);
    }
    stages.barrier();
  }
  if (stages.rank() != on(recipe.moe.layers)) return level;
  const Tensor dense_logits = stage.logits(x.dense_TW), moe_logits = stage.logits(x.moe_TW);
  if (mesh.here()[Axis::tensor] == 0) level.add_logits(dense_logits, moe_logits, batch.labels_BS.reshape({-1}));
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
  {
    const ComputeWithMasters fp32(stage.weights());
    certificate.functions.push_back(compare(stage, mesh, recipe, read, batch, alive));
  }
  if (config.train.precision != Precision::fp32) {
    certificate.functions.push_back(compare(stage, mesh, recipe, read, batch, alive));
  }

  const std::vector<std::string> evidence = mesh.world().all_gather(certificate.pack());
  for (int rank = 0; rank < mesh.world().size(); ++rank) {
    if (rank != mesh.world().rank()) certificate.merge(evidence[rank]);
  }
  return certificate;
}

}  // namespace upcycle
