#include "train/run_history.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "support/scratch.hpp"
#include "train/run_summary.hpp"

namespace upcycle {
namespace {

using Line = nlohmann::ordered_json;

Line start(int64_t step) { return {{"kind", "start"}, {"step", step}, {"tokens", 100 * step}, {"name", "run"}}; }

Line step(int64_t number, double loss) {
  return {{"kind", "step"}, {"step", number}, {"tokens", 100 * number}, {"loss", loss}, {"grad_norm", 1.0 / static_cast<double>(number)},
          {"tokens_per_second", 1000.0 * static_cast<double>(number)}, {"seconds", 0.5}, {"skipped", false}};
}

Line moe_step(int64_t number, double loss, const std::vector<std::vector<int64_t>>& tokens, const std::vector<double>& entropy) {
  Line line = step(number, loss);
  line["load_max_over_mean"] = 1.25, line["dead_experts"] = 1, line["router_entropy"] = 1.5;
  line["router_entropy_by_layer"] = entropy;
  line["tokens_per_expert"] = tokens;
  return line;
}

Line validation(int64_t number, double loss) { return {{"kind", "validation"}, {"step", number}, {"loss", loss}}; }

std::string joined(const std::vector<Line>& lines) {
  std::string out;
  for (const Line& line : lines) out += line.dump() + "\n";
  return out;
}

std::vector<int64_t> numbers(const RunHistory& history) {
  std::vector<int64_t> out;
  for (const auto& step : history.steps()) out.push_back(step.step);
  return out;
}

TEST(RunHistory, AStartTakesBackLaterSteps) {
  Scratch scratch;
  const auto path = store(scratch / "metrics.jsonl", joined({start(0), validation(0, 6), step(1, 5), step(2, 4), validation(2, 4.5), step(3, 3), start(1),
                                                            step(2, 4.25), validation(2, 4.75), step(3, 3.25)}));
  RunHistory history;
  EXPECT_EQ(history.read(path), static_cast<int64_t>(std::filesystem::file_size(path)));
  EXPECT_EQ(numbers(history), (std::vector<int64_t>{1, 2, 3}));
  EXPECT_EQ(history.steps()[1].loss, 4.25);
  EXPECT_EQ(history.steps()[2].loss, 3.25);
  ASSERT_EQ(history.validations().size(), 2u);
  EXPECT_EQ(history.validations()[1].loss, 4.75);
  ASSERT_EQ(history.starts().size(), 2u);
  EXPECT_EQ(history.starts()[0].seconds, 1.5) << "three steps, and no end line";
  history.add({{"kind", "end"}, {"step", 3}, {"seconds", 7.0}}, 0);
  EXPECT_EQ(history.starts()[1].seconds, 7.0);
}

TEST(RunHistory, ARollBackTakesBackLaterStepsInOneStart) {
  RunHistory history;
  for (const Line& line : {start(0), validation(0, 6), step(1, 5), step(2, 4), validation(2, 4.5), step(3, 30),
                           Line{{"kind", "rollback"}, {"step", 1}, {"tokens", 500}, {"from", 3}, {"bad_steps", 1}}, step(2, 4.25)}) {
    history.add(line, 0);
  }
  EXPECT_EQ(numbers(history), (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(history.steps()[1].loss, 4.25);
  EXPECT_EQ(history.validations().size(), 1u);
  EXPECT_EQ(history.starts().size(), 1u);
  EXPECT_EQ(history.starts()[0].seconds, 2.0) << "what was taken back took its time, too";
}

TEST(RunHistory, HalfALineIsCutOffAndNonsenseLeftOut) {
  Scratch scratch;
  const std::string whole = joined({start(0), step(1, 5)}) + "{nonsense\n[]\n" + joined({step(2, 4)});
  const auto path = store(scratch / "metrics.jsonl", whole + step(3, 3).dump().substr(0, 40));
  RunHistory history;
  EXPECT_EQ(history.read(path), static_cast<int64_t>(whole.size()));
  EXPECT_EQ(contents(path), whole);
  EXPECT_EQ(numbers(history), (std::vector<int64_t>{1, 2}));
  EXPECT_EQ(RunHistory().read(scratch / "none"), 0);
}

TEST(RunHistory, UseSinceTheLastLookSurvivesRestarts) {
  Scratch scratch;
  const Line look{{"kind", "experts"}, {"step", 2}, {"cosine", {0.5, 0.7}}, {"distance", {{0.1, 0.2}, {0.3, nullptr}}}};
  const auto path = store(scratch / "metrics.jsonl",
                          joined({start(0), moe_step(1, 5, {{100, 0, 0}, {9, 9, 9}}, {9, 9}), moe_step(2, 5, {{100, 0, 0}, {9, 9, 9}}, {9, 9}), look,
                                  moe_step(3, 5, {{2, 0, 2}, {1, 2, 1}}, {1.0, 1.5}), moe_step(4, 5, {{50, 50, 50}, {9, 9, 9}}, {9, 9}), start(3),
                                  moe_step(4, 5, {{4, 0, 0}, {0, 4, 0}}, {2.0, 2.5})}));
  RunHistory history;
  history.read(path);
  ASSERT_EQ(history.experts().size(), 1u);
  EXPECT_DOUBLE_EQ(history.experts()[0].cosine, 0.6);
  EXPECT_DOUBLE_EQ(history.experts()[0].distance, 0.2);
  EXPECT_TRUE(std::isnan(history.experts()[0].cosine_between));
  const ExpertUse use = use_since_last_look(history, path);
  EXPECT_EQ(use.steps, 2);
  EXPECT_EQ(use.load, (std::vector<std::vector<double>>{{0.75, 0, 0.25}, {0.125, 0.75, 0.125}}));
  EXPECT_EQ(use.dead, (std::vector<int64_t>{1, 0}));
  EXPECT_EQ(use.entropy, (std::vector<double>{1.5, 2.0}));
  history.add(start(1), 0);   // back behind the look
  const ExpertUse again = use_since_last_look(history, path);
  EXPECT_EQ(again.steps, 1);
  EXPECT_EQ(again.load[0][0], 1.0);
  history.add(start(0), 0);
  EXPECT_EQ(use_since_last_look(history, path).steps, 0);
  EXPECT_TRUE(use_since_last_look(history, path).load.empty());
}

RunEnd end_at(int64_t done) {
  RunEnd end;
  end.name = "eight", end.step = done, end.steps = 3, end.skipped = 1, end.seconds = 65;
  end.scale = {.flops_per_token = 1e9, .peak_flops = 8e12};
  end.memory = {.peak = int64_t{3} << 30, .planned = int64_t{700} << 20, .device = int64_t{80} << 30};
  end.experts = 8;
  end.directory = "runs/eight", end.checkpoint = "runs/eight/checkpoints/step-00000003", end.tensorboard = true;
  return end;
}

TEST(RunSummary, TellsTheRunOverAllItsStarts) {
  RunHistory history;
  for (const Line& line : {start(0), validation(0, 6), moe_step(1, 5, {{1}}, {1}), Line{{"kind", "end"}, {"step", 1}, {"seconds", 100.0}}, start(1),
                           moe_step(2, 4, {{1}}, {1}), validation(2, 4.5), moe_step(3, 3.5, {{1}}, {1}), validation(3, 4.75),
                           Line{{"kind", "experts"}, {"step", 3}, {"cosine", {0.2}}, {"cosine_between", {0.9}}, {"distance", {{0.25, 0.35}}}}}) {
    history.add(line, 0);
  }
  EXPECT_EQ(summarize(history, end_at(3)),
            "done: eight, 3 steps\n"
            "  tokens         300; 1 step skipped (gradient not finite, or loss a spike)\n"
            "  time           2m45s in 2 starts, 1m05s in this one\n"
            "  speed          2,000 tokens/s (the median step), 2.0 TFLOP/s, 25.0 % of the peak\n"
            "  loss           5.0000 at step 1 -> 3.5000 at step 3\n"
            "  validation     6.0000 at step 0 -> 4.7500 at step 3, best 4.5000 at step 2\n"
            "  gradient norm  0.333 to 1, median 0.5\n"
            "  experts        fullest / mean 1.25, 1 dead, router entropy 1.50 of at most 2.08 nats\n"
            "  expert weights cosine 0.9000 between copies, 0.3000 from their source\n"
            "  peak memory    3.00 GiB of 80.00 GiB on the fullest rank; planned in tensors: 700 MiB\n"
            "  checkpoint     runs/eight/checkpoints/step-00000003\n"
            "  next           upcycle export runs/eight DIRECTORY      for transformers and vLLM\n"
            "                 tools/plots runs/eight --out runs/eight/plots\n"
            "                 tensorboard --logdir runs/eight/tensorboard");
  history.add(start(2), 0);
  EXPECT_EQ(summarize(history, end_at(2)),
            "stopped on request after step 2 of 3: eight\n"
            "  tokens         200; 1 step skipped (gradient not finite, or loss a spike)\n"
            "  time           2m46s in 3 starts, 1m05s in this one\n"
            "  speed          2,000 tokens/s (the median step), 2.0 TFLOP/s, 25.0 % of the peak\n"
            "  loss           5.0000 at step 1 -> 4.0000 at step 2\n"
            "  validation     6.0000 at step 0 -> 4.5000 at step 2, the best\n"
            "  checkpoint     runs/eight/checkpoints/step-00000003\n"
            "  next           the same command goes on from here (exit code 75)");
}

TEST(RunSummary, ARunOfNothing) {
  RunHistory history;
  history.add(start(0), 0);
  RunEnd end = end_at(0);
  end.steps = end.skipped = 0, end.experts = 0, end.tensorboard = false;
  EXPECT_EQ(summarize(history, end),
            "done: eight, 0 steps\n"
            "  tokens         0\n"
            "  time           1m05s\n"
            "  peak memory    3.00 GiB of 80.00 GiB on the fullest rank; planned in tensors: 700 MiB\n"
            "  checkpoint     runs/eight/checkpoints/step-00000003\n"
            "  next           upcycle export runs/eight DIRECTORY      for transformers and vLLM\n"
            "                 tools/plots runs/eight --out runs/eight/plots");
}

}  // namespace
}  // namespace upcycle
