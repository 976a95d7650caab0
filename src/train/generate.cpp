#include "train/generate.hpp"

#include <ATen/ops/full.h>
#include <ATen/ops/tensor.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>

#include "base/autograd.hpp"
#include "base/error.hpp"
#include "base/rng.hpp"
#include "device/device.hpp"
#include "train/balance.hpp"

namespace upcycle {
namespace {

template <class T>
std::vector<T> row_of(const Tensor& x_TK, at::ScalarType dtype) {
  const Tensor row = x_TK.select(0, x_TK.size(0) - 1).to(at::kCPU, dtype).contiguous();
  return {row.const_data_ptr<T>(), row.const_data_ptr<T>() + row.numel()};
}

}  // namespace

const char* name(Ending ending) {
  return ending == Ending::end_token ? "end token" : ending == Ending::tokens ? "tokens" : "positions";
}

ParallelSection generation_layout(const Architecture& architecture, int world) {
  ParallelSection degrees;
  if (architecture.is_moe()) degrees.expert = std::gcd(architecture.experts, static_cast<int64_t>(world));
  return degrees;
}

Generator::Generator(const Architecture& architecture, const Fill& fill, const nlohmann::json& routers, const Mesh& mesh, at::Device device,
                     at::ScalarType compute)
    : mesh_(mesh),
      // Not "automatic": of the two ways, only this one adds a token's experts up in the same order on any number of ranks.
      stage_(architecture, Layout::even(mesh.grid(), architecture), mesh, {.dispatcher = Dispatch::all_to_all, .capacity = {}}),
      works_(architecture.is_moe() ? mesh.here()[Axis::expert_data] == 0 : mesh.world().rank() == 0),
      device_(device) {
  if (!works_) return;
  stage_.weights().allocate_for_inference(compute, device);
  fill_masters(stage_.weights(), fill);
  const RunConfig no_run;
  Balance(no_run, mesh_, stage_).restore(routers);
}

// Whether rank 0, which alone knows, will call for the experts of the others once more.
bool Generator::another_pass(bool more) const {
  Tensor flag = at::full({}, more ? 1 : 0, at::kLong);
  mesh_.along(Axis::expert).broadcast(flag, 0);
  return flag.item<int64_t>() != 0;
}

Ending Generator::generate(const GenerationRequest& request, int64_t sample, const std::function<void(const GeneratedToken&)>& tell) {
  if (!speaks()) {
    while (works_ && another_pass()) read({});
    return Ending::tokens;
  }
  const auto length = static_cast<int64_t>(request.prompt.size());
  const int64_t most = std::min(request.tokens, stage_.architecture().max_positions - length);
  Tensor logits_V = after_prompt(request, length + most);
  const Random random(request.seed, text("sample/", sample));
  Ending ending = most < request.tokens ? Ending::positions : Ending::tokens;
  for (int64_t i = 0; i < most; ++i) {
    const int64_t token = choose_token(logits_V, request.choice, random.uniform(static_cast<uint64_t>(i)));
    if (request.ends.contains(token)) {
      ending = Ending::end_token;
      break;
    }
    tell({token, routing_});
    if (i + 1 < most) logits_V = pass({token});
  }
  another_pass(false);
  return ending;
}

Tensor Generator::after_prompt(const GenerationRequest& request, int64_t room) {
  const bool again = before_ && prompt_ == request.prompt && notes_routing_ == request.routing && before_->room() >= room;
  if (again) {
    before_->shorten(static_cast<int64_t>(prompt_.size()));
  } else {
    begin(room);
    notes_routing_ = request.routing;
    prompt_logits_ = pass(request.prompt);
    prompt_routing_ = routing_;
    prompt_ = request.prompt;
  }
  routing_ = prompt_routing_;
  return prompt_logits_;
}

Tensor Generator::pass(const std::vector<int64_t>& tokens) {
  another_pass(true);
  return read(tokens);
}

void Generator::begin(int64_t room) {
  prompt_.clear();
  before_.emplace(room);
}

Tensor Generator::read(const std::vector<int64_t>& tokens) {
  const Unrecorded guard;
  if (!speaks()) {
    // No token is here, and so neither is anything to attend to; yet tokens may come from rank 0, and all take part in every exchange.
    for (Block& block : stage_.layers()) {
      if (works_ && block.moe()) block.feed_forward(stage_.room(0), {});
    }
    return {};
  }
  const auto count = static_cast<int64_t>(tokens.size());
  const Positions positions = stage_.positions_after(before_.value(), 1, count);
  Tensor x_TW = stage_.embed(device::send(at::tensor(tokens, at::kLong).unsqueeze(0), device_));
  routing_.clear();
  for (Block& block : stage_.layers()) {
    x_TW = block.attend(x_TW, positions);
    const Tensor h_TW = block.feed_forward_input(x_TW);
    if (notes_routing_ && block.moe()) look_at_routing(block, h_TW);
    x_TW = x_TW + block.feed_forward(h_TW, {});
  }
  before_->advance(count);
  return stage_.logits(x_TW.narrow(0, count - 1, 1)).squeeze(0);
}

// The router's word once more: a pure function, and of one row a cheap one.
void Generator::look_at_routing(Block& block, const Tensor& h_TW) {
  const Routing routing = block.moe()->router().forward(h_TW.narrow(0, h_TW.size(0) - 1, 1), {});
  routing_.push_back({block.layer(), row_of<int64_t>(routing.expert_TK, at::kLong), row_of<double>(routing.weight_TK, at::kDouble)});
}

}  // namespace upcycle
