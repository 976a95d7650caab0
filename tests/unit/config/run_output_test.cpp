#include <gtest/gtest.h>

#include <nlohmann/json.hpp>
#include <set>

#include "base/error.hpp"
#include "config/fields.hpp"
#include "config/suggest.hpp"

namespace upcycle {
namespace {

using nlohmann::json;

/// A run in which no key has its default, but for those that parallel.layout and source.models exclude.
RunConfig unusual_run() {
  return parse_run(R"(
run = {name = "odd", directory = "a \"quoted\" \u007f directory", seed = 1, timeout = "9s", transport = "nccl", device = "cpu", share_gpu = true, signal = "HUP"}
source = {models = ["m", "n"], quotas = [5, 11], architecture = "a", tokenizer = "t"}
moe = {experts = 32, top_k = 4, granularity = 2, pre_softmax = true, layers = [1, 3], dispatcher = "all-gather", max_parameters = 1e9}
upcycle = {scaling = "none", router_logit_std = 0.1, noise = 1e-3, drop = 0.5, drop_indices = "per-matrix", certify = false, certify_tokens = 64, permutation = "random", optimizer = "scaled"}
train = {steps = 77, sequence = 64, global_batch = 12, micro_batch = 3, precision = "fp32", recompute = "full", deterministic = true, nan_policy = "stop", nan_limit = 3, spike = 6.5, rollbacks = 1, check_replicas = 50}
balance = {aux = 0.01, scope = "global", z = 1e-3, bias_rate = 1e-3, jitter = 0.01, capacity_factor = 1.25, drop_policy = "position", pad_to_capacity = true}
data = {train = [[0.3, "a"], [0.7, "b"]], validation = "mock", split = [9, 1, 0], documents = "packed", seed = 77, epochs = 2.5}
parallel = {tensor = 2, context = 3, pipeline = 4, virtual_stages = 2, layout = "1|2|1|1|1|2|1|10", expert = 5, expert_tensor = 2, zero = 0}
checkpoint = {every = 10, keep = 9, keep_every = 70, keep_best = true, asynchronous = true, transfer = "buffered", file_size = 2.5}
validate = {every = 5, batches = 2}
log = {every = 3, tensorboard = true, experts_every = 7}
[optimizer]
lr = 3.0000000000000001e-4
min_lr = 1e-7
schedule = "wsd"
warmup = 11
decay = 22
weight_decay = 0.0
betas = [0.8, 0.99]
eps = 1e-20
clip = 0
router_lr_scale = 0.7
)",
                   "unusual.toml");
}

TEST(Output, TomlReadsBackToTheSameRun) {
  for (const RunConfig& run :
       {unusual_run(), parse_run("source = {model = \"m\"}", "plain.toml"),
        parse_run("source = {model = \"m\"}\nmoe = {experts = 8, granularity = 8}", "moe.toml"),
        parse_run("source = {model = \"m\"}\nparallel = {count_embedding = true, count_loss = true}", "counted.toml")}) {
    const RunConfig again = parse_run(to_toml(run), "again.toml");
    EXPECT_EQ(to_json(again), to_json(run)) << to_toml(run);
    EXPECT_EQ(again.moe_given, run.moe_given);
    EXPECT_EQ(again.router_lr_scale(), run.router_lr_scale());
    EXPECT_EQ(again.run.directory, run.run.directory);
  }
}

TEST(Output, EveryKeyIsThereAndNoneHasItsDefaultInTheUnusualRun) {
  const RunConfig run = unusual_run();
  const json unusual = json::parse(to_json(run));
  RunConfig defaults;
  std::set<std::string> keys;
  for (const Field& field : describe(defaults)) {
    EXPECT_TRUE(keys.insert(field.key).second) << field.key << " is listed twice";
    if (field.key.starts_with("parallel.count_") || field.key == "source.model") continue;
    EXPECT_NE(unusual.at(field.section()).at(field.name()), field.write()) << field.key;
    EXPECT_EQ(run.origins.at(field.key).substr(0, 13), "unusual.toml:") << field.key;
  }
  EXPECT_EQ(keys.size(), run.origins.size());
}

TEST(Output, TomlSaysWhereEachValueCameFrom) {
  const std::string toml = to_toml(parse_run("[source]\nmodel = \"m\"\n", "run.toml", {"train.steps=3"}));
  EXPECT_NE(toml.find("# --set"), std::string::npos);
  EXPECT_NE(toml.find("# run.toml:2"), std::string::npos);
  EXPECT_NE(toml.find("# default"), std::string::npos);
  EXPECT_EQ(toml.find("[moe]"), std::string::npos) << "absent in the run, absent in its record";
}

TEST(Suggest, DistanceAndNearest) {
  EXPECT_EQ(edit_distance("steps", "steps"), 0);
  EXPECT_EQ(edit_distance("stesp", "steps"), 1);
  EXPECT_EQ(edit_distance("", "abc"), 3);
  EXPECT_EQ(edit_distance("kitten", "sitting"), 3);
  EXPECT_EQ(closest("trian", {"plan", "train"}), "train");
  EXPECT_EQ(closest("micro", {"micro_batch", "steps"}), "micro_batch");
  EXPECT_EQ(closest("zzz", {"plan", "train"}), "");
  EXPECT_EQ(did_you_mean("zzz", {"plan"}), "");
}

}  // namespace
}  // namespace upcycle
