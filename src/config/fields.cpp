#include "config/fields.hpp"

#include "config/field_kinds.hpp"

namespace upcycle {

std::vector<Field> describe(RunConfig& c) {
  const auto from_zero = [](const nlohmann::json& value) { return integer_problem(value, 0, kAny); };
  const auto decay = [](const nlohmann::json& value) { return number_problem(value, kDecay); };
  return {
      name("run.name", c.run.name),
      words("run.directory", c.run.directory),
      integer("run.seed", c.run.seed, 0),
      duration("run.timeout", c.run.timeout),
      choice<Transport>("run.transport", c.run.transport,
                        {{"auto", Transport::automatic}, {"nccl", Transport::nccl}, {"mpi", Transport::mpi}}),
      choice("run.device", c.run.device, {"auto", "cpu", "cuda"}),
      flag("run.share_gpu", c.run.share_gpu),
      choice("run.signal", c.run.signal, {"USR1", "USR2", "HUP", "INT", "ALRM", "XCPU", "TERM"}),

      words("source.model", c.source.model),
      word_list("source.models", c.source.models),
      integer_list("source.quotas", c.source.quotas, 1),
      words("source.architecture", c.source.architecture),
      words("source.tokenizer", c.source.tokenizer),

      integer("moe.experts", c.moe.experts, 0, 65536),
      integer("moe.top_k", c.moe.top_k, 1, 65536),
      integer("moe.granularity", c.moe.granularity, 1, 65536),
      flag("moe.pre_softmax", c.moe.pre_softmax),
      layers("moe.layers", c.moe.layers_text),
      choice<Dispatch>("moe.dispatcher", c.moe.dispatcher,
                       {{"auto", Dispatch::automatic}, {"all-to-all", Dispatch::all_to_all}, {"all-gather", Dispatch::all_gather}}),
      number("moe.max_parameters", c.moe.max_parameters, kPositive),

      choice<Scaling>("upcycle.scaling", c.upcycle.scaling,
                      {{"exact", Scaling::exact}, {"cube-root", Scaling::cube_root}, {"none", Scaling::none}}),
      choice<UnitOrder>("upcycle.permutation", c.upcycle.permutation,
                          {{"identity", UnitOrder::identity}, {"random", UnitOrder::random}, {"clusters", UnitOrder::clusters}}),
      number("upcycle.router_logit_std", c.upcycle.router_logit_std, kNotNegative),
      number("upcycle.noise", c.upcycle.noise, kNotNegative),
      number("upcycle.drop", c.upcycle.drop, kShare),
      choice<DropIndices>("upcycle.drop_indices", c.upcycle.drop_indices,
                          {{"shared", DropIndices::shared}, {"per-matrix", DropIndices::per_matrix}}),
      choice<Moments>("upcycle.optimizer", c.upcycle.optimizer,
                      {{"reset", Moments::reset}, {"copy", Moments::copy}, {"scaled", Moments::scaled}}),
      flag("upcycle.certify", c.upcycle.certify),
      integer("upcycle.certify_tokens", c.upcycle.certify_tokens, 2),

      integer("train.steps", c.train.steps, 0),
      integer("train.sequence", c.train.sequence, 2, 1 << 24),
      integer("train.global_batch", c.train.global_batch, 1, 1 << 24),
      integer("train.micro_batch", c.train.micro_batch, 1, 1 << 24),
      choice<Precision>("train.precision", c.train.precision, {{"bf16", Precision::bf16}, {"fp32", Precision::fp32}}),
      choice<Recompute>("train.recompute", c.train.recompute,
                        {{"none", Recompute::none}, {"selective", Recompute::selective}, {"full", Recompute::full}}),
      flag("train.deterministic", c.train.deterministic),
      choice<NanPolicy>("train.nan_policy", c.train.nan_policy, {{"skip", NanPolicy::skip}, {"stop", NanPolicy::stop}}),
      integer("train.nan_limit", c.train.nan_limit, 1),
      number("train.spike", c.train.spike, kNotNegative),
      integer("train.rollbacks", c.train.rollbacks, 0),
      integer("train.check_replicas", c.train.check_replicas, 0),

      number("optimizer.lr", c.optimizer.lr, kPositive),
      number("optimizer.min_lr", c.optimizer.min_lr, kNotNegative),
      choice<Schedule>("optimizer.schedule", c.optimizer.schedule,
                       {{"constant", Schedule::constant},
                        {"linear", Schedule::linear},
                        {"cosine", Schedule::cosine},
                        {"inverse-sqrt", Schedule::inverse_sqrt},
                        {"wsd", Schedule::wsd}}),
      integer("optimizer.warmup", c.optimizer.warmup, 0),
      integer("optimizer.decay", c.optimizer.decay, 0),
      number("optimizer.weight_decay", c.optimizer.weight_decay, kNotNegative),
      fixed_list("optimizer.betas", c.optimizer.betas, decay),
      number("optimizer.eps", c.optimizer.eps, kPositive),
      number("optimizer.clip", c.optimizer.clip, kNotNegative),
      number("optimizer.router_lr_scale", c.optimizer.router_lr_scale, kNotNegative,
             [&c] { return c.router_lr_scale(); }),

      number("balance.aux", c.balance.aux, kNotNegative),
      choice<BalanceScope>(
          "balance.scope", c.balance.scope,
          {{"batch", BalanceScope::batch}, {"sequence", BalanceScope::sequence}, {"global", BalanceScope::global}}),
      number("balance.z", c.balance.z, kNotNegative),
      number("balance.bias_rate", c.balance.bias_rate, kNotNegative),
      number("balance.jitter", c.balance.jitter, kShare),
      number("balance.capacity_factor", c.balance.capacity_factor, kNotNegative),
      choice<DropPolicy>("balance.drop_policy", c.balance.drop_policy,
                         {{"probs", DropPolicy::weight}, {"position", DropPolicy::position}}),
      flag("balance.pad_to_capacity", c.balance.pad_to_capacity),

      blend("data.train", c.data.train),
      blend("data.validation", c.data.validation),
      fixed_list("data.split", c.data.split, from_zero),
      choice<Borders>("data.documents", c.data.documents, {{"concatenated", Borders::concatenated}, {"packed", Borders::packed}}),
      integer("data.seed", c.data.seed, 0, [&c] { return c.data_seed(); }),
      number("data.epochs", c.data.epochs, kNotNegative),

      integer("parallel.tensor", c.parallel.tensor, 1, 4096),
      integer("parallel.context", c.parallel.context, 1, 4096),
      integer("parallel.pipeline", c.parallel.pipeline, 1, 4096),
      integer("parallel.virtual_stages", c.parallel.virtual_stages, 1, 4096),
      flag("parallel.count_embedding", c.parallel.count_embedding),
      flag("parallel.count_loss", c.parallel.count_loss),
      layer_counts("parallel.layout", c.parallel.layout),
      integer("parallel.expert", c.parallel.expert, 1, 4096),
      integer("parallel.expert_tensor", c.parallel.expert_tensor, 1, 4096),
      integer("parallel.zero", c.parallel.zero, 0, 1),

      integer("checkpoint.every", c.checkpoint.every, 1),
      integer("checkpoint.keep", c.checkpoint.keep, 1),
      integer("checkpoint.keep_every", c.checkpoint.keep_every, 0),
      flag("checkpoint.keep_best", c.checkpoint.keep_best),
      flag("checkpoint.asynchronous", c.checkpoint.asynchronous),
      choice("checkpoint.transfer", c.checkpoint.transfer, {"auto", "direct", "buffered", "independent"}),
      number("checkpoint.file_size", c.checkpoint.file_size, kPositive),

      integer("validate.every", c.validate.every, 0),
      integer("validate.batches", c.validate.batches, 1),

      integer("log.every", c.log.every, 1),
      flag("log.tensorboard", c.log.tensorboard),
      integer("log.experts_every", c.log.experts_every, 0),
  };
}

}  // namespace upcycle
