#include "train/certify.hpp"

#include <ATen/ops/cat.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/zeros_like.h>

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

// One feed-forward of the source, read for as long as this lives: a dense layer's, or one expert's.
class FeedForwardOfSource {
 public:
  // `read` gives a matrix by its name in front of ".weight": "gate_proj".
  FeedForwardOfSource(const std::function<Tensor(const char* matrix)>& read, const Tensor& like) {
    gate_.value = read("gate_proj").to(like.options());
    up_.value = read("up_proj").to(like.options());
    down_.value = read("down_proj").to(like.options());
  }
  Tensor forward(const Tensor& x_TW) {
    const Tensor gate_up = at::cat({linear(x_TW, gate_), linear(x_TW, up_)}, -1);
    return linear(swiglu(gate_up), down_);
  }

 private:
  Parameter gate_, up_, down_;
};

// What a dense source's layer makes of x.
Tensor dense_layer(const Recipe& recipe, const ReadDense& read, const std::string& prefix, const Tensor& x_TW) {
  const int64_t width = recipe.source.ffn, hidden = recipe.source.hidden;
  FeedForwardOfSource feed_forward([&](const char* matrix) {
    const bool down = matrix == std::string("down_proj");
    return read(prefix + matrix + ".weight", whole(down ? Shape{hidden, width} : Shape{width, hidden}));
  }, x_TW);
  return feed_forward.forward(x_TW);
}

// What a mixture's layer makes of x: its experts one after another, each read when a token of this rank wants it; summed in fp32.
Tensor mixture_layer(const Recipe& recipe, const ReadDense& read, const std::string& prefix, const Tensor& x_TW) {
  const Architecture& a = recipe.source;
  Parameter router;
  router.value = read(prefix + "gate.weight", whole({a.experts, a.hidden})).to(x_TW.options().dtype(at::kFloat));
  const Tensor logits_TN = linear(x_TW, router), expert_TK = choose_experts(logits_TN, a.top_k);
  const Tensor weight_TK = a.renormalise ? at::softmax(logits_TN.gather(1, expert_TK), -1) : at::softmax(logits_TN, -1).gather(1, expert_TK);
  const Tensor sum_TW = at::zeros_like(x_TW, x_TW.options().dtype(at::kFloat));
  for (int64_t e = 0; e < a.experts; ++e) {
    const Tensor chosen = expert_TK.eq(e);   // at most once by a token
    const Tensor rows = chosen.any(1).nonzero().select(1, 0);
    if (rows.numel() == 0) continue;
    FeedForwardOfSource expert([&](const char* matrix) {
      const bool down = matrix == std::string("down_proj");
      const Box box{{e, 0, 0}, {1, down ? a.hidden : a.expert_ffn, down ? a.expert_ffn : a.hidden}};
      return read(prefix + "experts." + matrix + ".weight", box).select(0, 0);
    }, x_TW);
    const Tensor weight = weight_TK.mul(chosen).sum(1).index_select(0, rows).unsqueeze(1);
    sum_TW.index_add_(0, rows, expert.forward(x_TW.index_select(0, rows)).to(at::kFloat) * weight);
  }
  return sum_TW.to(x_TW.scalar_type());
}

// The token rows of both models, the source and what grew out of it, between two layers.
struct Streams {
  Tensor dense_TW, moe_TW;
};

// Both models side by side through one layer. They share all weights but the feed-forwards, so the source needs only those. Each
// rank judges its own rows.
Streams compare(Block& block, const Streams& x, const Positions& positions, const Recipe& recipe, const ReadDense& read, FunctionLevel& level) {
  Tensor dense = block.attend(x.dense_TW, positions), moe = block.attend(x.moe_TW, positions);
  const Tensor dense_input = block.feed_forward_input(dense), moe_input = block.feed_forward_input(moe);
  if (MoeLayer* layer = block.moe()) {
    const std::string prefix = text("model.layers.", block.layer(), ".mlp.");
    const Tensor expected = recipe.of_mixture() ? mixture_layer(recipe, read, prefix, dense_input) : dense_layer(recipe, read, prefix, dense_input);
    level.layers[block.layer()].add(expected, block.feed_forward(dense_input, {}));
    dense = dense + expected;
    const Tensor logits_TN = layer->router().logits(moe_input);
    level.routing.add(logits_TN, choose_experts(logits_TN, recipe.moe.top_k), recipe.tied());
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
