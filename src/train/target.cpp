#include "train/target.hpp"

#include "base/error.hpp"
#include "model/catalogue.hpp"

namespace upcycle {

void refuse_contradiction(const MoeSection& moe, const Architecture& source) {
  if (moe.experts == 0 || (source.experts == moe.experts && source.top_k == moe.top_k && source.renormalise != moe.pre_softmax)) return;
  fail("the source is a mixture of ", source.experts, " experts, top-", source.top_k, source.renormalise ? "" : ", pre-softmax",
       ", but [moe] asks for experts = ", moe.experts, ", top_k = ", moe.top_k, moe.pre_softmax ? ", pre_softmax = true" : "",
       ": make them agree, or leave [moe] out");
}

Target choose_target(const RunConfig& run, const Architecture& source, bool has_weights) {
  Target target{source, std::nullopt};
  const MoeSection& moe = run.moe;
  if (source.is_moe() && (moe.experts == source.experts || !has_weights)) {
    refuse_contradiction(moe, source);
  } else if (moe.experts > 0) {
    if (has_weights) target.recipe = make_recipe(source, run);
    target.architecture = has_weights ? target.recipe->moe : moe_architecture(source, moe);
  }
  const auto total = static_cast<double>(count_parameters(target.architecture).total);
  if (total > moe.max_parameters) {
    fail("the model has ", total, " parameters, more than moe.max_parameters = ", moe.max_parameters,
         ": raise the limit if this is meant");
  }
  return target;
}

}  // namespace upcycle
