#include "train/run_changes.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "config/fields.hpp"

namespace upcycle {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

RunConfig run_with(const std::vector<std::string>& settings) { return parse_run("source = {model = \"m\"}\nmoe = {experts = 8}", "run.toml", settings); }

std::vector<std::string> lines(const std::vector<RunChange>& changes) {
  std::vector<std::string> out;
  for (const RunChange& change : changes) out.push_back(line_of(change));
  return out;
}

std::vector<std::string> keys(const std::vector<RunChange>& changes) {
  std::vector<std::string> out;
  for (const RunChange& change : changes) out.push_back(change.key);
  return out;
}

TEST(RunChanges, ListsAllAtOnceWithBothValues) {
  const RunConfig there = run_with({}), here = run_with({"optimizer.lr=0.5", "run.seed=7", "train.global_batch=64", "data.train=mock", "balance.aux=0"});
  EXPECT_THAT(lines(run_changes(there, here)),
              ElementsAre("run.seed: 1234 there, 7 here", "train.global_batch: 128 there, 64 here", "optimizer.lr: 0.0001 there, 0.5 here",
                          "balance.aux: 0.001 there, 0.0 here", "data.train: [] there, \"mock\" here", "data.seed: 1234 there, 7 here"));
  EXPECT_THAT(run_changes(here, here), IsEmpty());
}

TEST(RunChanges, LayoutIntervalsAndPlacesAreFree) {
  const RunConfig here = run_with({"run.name=other", "run.directory=elsewhere", "run.device=cpu", "run.timeout=1min", "run.transport=mpi", "run.signal=HUP",
                                   "parallel.tensor=4", "parallel.zero=0", "parallel.expert=8", "log.every=1", "checkpoint.every=7", "checkpoint.keep=9",
                                   "validate.every=7", "validate.batches=1", "train.micro_batch=2", "train.recompute=full", "moe.dispatcher=all-gather",
                                   "train.nan_limit=2", "train.nan_policy=stop", "train.rollbacks=0", "train.check_replicas=5", "train.deterministic=true"});
  EXPECT_THAT(lines(run_changes(run_with({}), here)), IsEmpty());
}

TEST(RunChanges, WhatIsComputedIsListed) {
  for (const char* setting : {"train.spike=6", "train.sequence=8", "train.precision=fp32", "optimizer.warmup=3", "optimizer.weight_decay=0", "optimizer.betas=[0.8, 0.9]",
                              "optimizer.eps=1e-6", "optimizer.clip=0", "optimizer.router_lr_scale=0.5", "optimizer.min_lr=1e-6", "optimizer.schedule=linear",
                              "balance.scope=global", "balance.z=1", "balance.bias_rate=1", "balance.jitter=0.5", "balance.capacity_factor=2",
                              "balance.drop_policy=position", "data.split=[1,1,1]", "data.documents=packed", "data.seed=3", "data.validation=mock",
                              "moe.experts=16", "moe.top_k=1", "upcycle.noise=0.5", "upcycle.scaling=none"}) {
    const std::string key = std::string(setting).substr(0, std::string(setting).find('='));
    EXPECT_THAT(keys(run_changes(run_with({}), run_with({setting}))), ElementsAre(key));
  }
}

TEST(RunChanges, OtherLengthsAreFreeWhereTheStepsDoneWouldHaveBeenTheSame) {
  const auto steps = [](const std::string& schedule, int64_t there, int64_t here, int64_t done) {
    std::vector<std::string> settings{"optimizer.schedule=" + schedule, "optimizer.warmup=10"};
    if (schedule == "wsd") settings.push_back("optimizer.decay=20");
    std::vector<std::string> before = settings, now = settings;
    before.push_back(text("train.steps=", there)), now.push_back(text("train.steps=", here));
    return lines(run_changes(run_with(before), run_with(now), done));
  };
  for (const char* schedule : {"constant", "inverse-sqrt"}) {
    EXPECT_THAT(steps(schedule, 100, 1000, 100), IsEmpty());
    EXPECT_THAT(steps(schedule, 100, 60, 50), IsEmpty());
  }
  for (const char* schedule : {"cosine", "linear"}) {
    EXPECT_THAT(steps(schedule, 100, 1000, 10), IsEmpty()) << "all of them were of the warm-up";
    EXPECT_THAT(steps(schedule, 100, 1000, 11), ElementsAre(HasSubstr("train.steps: 100 there, 1000 here (the learning rate falls otherwise then: already that of step 11 ")));
  }
  EXPECT_THAT(steps("wsd", 100, 1000, 80), IsEmpty()) << "before the descent";
  EXPECT_THAT(steps("wsd", 100, 1000, 81), ElementsAre(HasSubstr("step 81")));
  EXPECT_THAT(steps("wsd", 100, 90, 71), ElementsAre(HasSubstr("step 71")));
  EXPECT_THAT(steps("cosine", 100, 1000, 0), IsEmpty());
}

TEST(RunChanges, TheRunOfAManifestReadsBack) {
  const RunConfig run = run_with({"train.steps=77", "optimizer.lr=3.0000000000000001e-4", "data.train=[[0.3, \"a\"], [0.7, \"b\"]]", "moe.layers=[0, 1]",
                                  "parallel.layout=1|2", "parallel.pipeline=2", "optimizer.router_lr_scale=0.25"});
  EXPECT_THAT(lines(run_changes(run_from_json(to_json(run), "manifest.json"), run)), IsEmpty());
  EXPECT_TRUE(run_from_json(to_json(run), "manifest.json").moe_given);
  // Of a program that knew fewer keys, and of one that knows more.
  nlohmann::json other = nlohmann::json::parse(to_json(run));
  other["train"].erase("spike");
  other["train"]["vigour"] = 3;
  EXPECT_THAT(lines(run_changes(run_from_json(other.dump(), "manifest.json"), run)), IsEmpty());
  other["train"]["steps"] = "many";
  EXPECT_THAT([&] { run_from_json(other.dump(), "step/manifest.json"); },
              testing::ThrowsMessage<UserError>(HasSubstr("step/manifest.json: run.train.steps: an integer is expected")));
  EXPECT_THROW(run_from_json("[1]", "manifest.json"), UserError);
}

}  // namespace
}  // namespace upcycle
