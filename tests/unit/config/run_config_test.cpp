#include "config/run_config.hpp"

#include <gtest/gtest.h>

#include "base/error.hpp"

namespace upcycle {
namespace {

const std::string kSource = "[source]\nmodel = \"m\"\n";

std::string problem(const std::string& toml, const std::vector<std::string>& overrides = {}) {
  try {
    parse_run(toml, "run.toml", overrides);
  } catch (const UserError& error) {
    return error.what();
  }
  return "no problem";
}

void expect_problem(const std::string& toml, const std::string& part, const std::vector<std::string>& overrides = {}) {
  const std::string found = problem(toml, overrides);
  EXPECT_NE(found.find(part), std::string::npos) << "of\n" << toml << "\nexpected: " << part << "\nfound:    " << found;
}

TEST(RunFile, DefaultsAreThoseOfTheStructs) {
  const RunConfig run = parse_run(kSource, "run.toml");
  EXPECT_EQ(run.run.directory, "runs/run");
  EXPECT_EQ(run.train.sequence, 4096);
  EXPECT_EQ(run.optimizer.betas, (std::array<double, 2>{0.9, 0.95}));
  EXPECT_FALSE(run.moe_given);
  EXPECT_EQ(run.origins.at("train.sequence"), "default");
  EXPECT_EQ(run.origins.at("source.model"), "run.toml:2");
  EXPECT_EQ(run.timeout_seconds(), 600.0);
}

TEST(RunFile, EveryKindOfValueIsRead) {
  const RunConfig run = parse_run(R"([run]
name = "a-1"
directory = "/somewhere"
seed = 7
timeout = "1.5h"
transport = "mpi"
[source]
architecture = "a.json"
[moe]
experts = 8
pre_softmax = true
layers = [0, 2]
max_parameters = 7
[upcycle]
scaling = "cube-root"
drop_indices = "per-matrix"
[optimizer]
lr = 1
min_lr = 0.5
schedule = "wsd"
decay = 10
betas = [0, 0.5]
router_lr_scale = 0.25
[data]
train = [[1, "a"], [0.5, "mock"]]
validation = "mock"
split = [1, 0, 0]
documents = "packed"
epochs = 1
)",
                                  "run.toml");
  EXPECT_EQ(run.run.directory, "/somewhere");
  EXPECT_EQ(run.timeout_seconds(), 5400.0);
  EXPECT_EQ(run.run.transport, Transport::mpi);
  EXPECT_TRUE(run.moe_given && run.moe.pre_softmax);
  EXPECT_EQ(run.moe.layers_text, "[0,2]");
  EXPECT_EQ(run.moe.max_parameters, 7.0);
  EXPECT_EQ(run.upcycle.scaling, Scaling::cube_root);
  EXPECT_EQ(run.upcycle.drop_indices, DropIndices::per_matrix);
  EXPECT_EQ(run.optimizer.lr, 1.0);
  EXPECT_EQ(run.optimizer.betas[1], 0.5);
  EXPECT_EQ(run.router_lr_scale(), 0.25);
  EXPECT_EQ(run.data.train, (std::vector<Blend>{{1.0, "a"}, {0.5, "mock"}}));
  EXPECT_EQ(run.data.validation, (std::vector<Blend>{{1.0, "mock"}}));
  EXPECT_EQ(run.data.documents, Borders::packed);
  EXPECT_EQ(run.data.epochs, 1.0);
}

TEST(RunFile, RouterLearningRateFollowsTheGranularity) {
  EXPECT_EQ(parse_run(kSource + "[moe]\nexperts = 8\n", "r").router_lr_scale(), 1.0);
  EXPECT_EQ(parse_run(kSource + "[moe]\nexperts = 8\ngranularity = 4\n", "r").router_lr_scale(), 0.1);
}

TEST(RunFile, WrongKindsAreNamedWithTheirPlace) {
  expect_problem(kSource + "[train]\nsteps = true\n",
                 "run.toml:4:9: train.steps: an integer is expected, not the boolean true");
  expect_problem(kSource + "[train]\nsteps = 1e3\n", "an integer is expected, not the float 1000.0: write 1000");
  expect_problem(kSource + "[train]\nsteps = 1.5\n", "not the float 1.5");
  expect_problem(kSource + "[train]\nsteps = \"10\"\n", "not the string \"10\"");
  expect_problem(kSource + "[train]\nsteps = 2024-01-01\n", "not a date or time");
  expect_problem(kSource + "[train]\nsteps = [1]\n", "not a list");
  expect_problem(kSource + "[train]\nsteps = {a = 1}\n", "not a table");
  expect_problem(kSource + "[optimizer]\nlr = true\n", "a number is expected, not the boolean true");
  expect_problem(kSource + "[optimizer]\nlr = nan\n", "a number is expected, not the float nan");
  expect_problem(kSource + "[optimizer]\nlr = inf\n", "a number is expected, not the float inf");
  expect_problem(kSource + "[upcycle]\ncertify = 1\n", "true or false is expected, not the integer 1");
  expect_problem(kSource + "[run]\nname = 5\n", "a string is expected, not the integer 5");
  expect_problem("[source]\nmodel = 2024-01-01\n", "a string is expected, not a date or time");
  expect_problem(
      kSource + "[train]\nprecision = \"bf17\"\n",
      "run.toml:4:13: train.precision: choose \"bf16\" or \"fp32\", not the string \"bf17\"; did you mean 'bf16'?");
  expect_problem(kSource + "[optimizer]\nbetas = [0.9]\n", "a list of 2 numbers is expected, not [0.9]");
  expect_problem(kSource + "[optimizer]\nbetas = 0.9\n", "a list of 2 numbers is expected, not the float 0.9");
  expect_problem(kSource + "[data]\nsplit = [1, 2, 0.5]\n", "entry 3: an integer is expected");
}

TEST(RunFile, RangesAreHeld) {
  expect_problem(kSource + "[train]\nsequence = 1\n", "train.sequence: 1 is less than 2");
  expect_problem(kSource + "[parallel]\nzero = 5\n", "parallel.zero: 5 is more than 1");
  expect_problem(kSource + "[optimizer]\nlr = 0\n", "optimizer.lr: 0 must be more than 0");
  expect_problem(kSource + "[optimizer]\nclip = -1.0\n", "optimizer.clip: -1.0 is less than 0");
  expect_problem(kSource + "[upcycle]\ndrop = 1.5\n", "upcycle.drop: 1.5 is more than 1");
  expect_problem(kSource + "[optimizer]\nbetas = [0.9, 1]\n", "optimizer.betas: entry 2: 1 must be less than 1");
  for (const std::string wrong : {"10", "min", "-1s", "0s", "1 h", "1e999h", "10minutes"}) {
    expect_problem(kSource + "[run]\ntimeout = \"" + wrong + "\"\n",
                   "run.timeout: \"" + wrong + "\": a duration is a positive number");
  }
  for (const std::string wrong : {"", "a/b", ".hidden", "two words"}) {
    expect_problem(kSource + "[run]\nname = \"" + wrong + "\"\n", "run.name: \"" + wrong + "\": letters, digits");
  }
}

TEST(RunFile, LayerPoliciesAndBlends) {
  for (const std::string good : {"\"all\"", "\"every:2\"", "\"first-dense:0\"", "[3]"}) {
    EXPECT_EQ(problem(kSource + "[moe]\nlayers = " + good + "\n"), "no problem");
  }
  for (const std::string wrong : {"\"some\"", "\"every:0\"", "\"every:\"", "\"every:2x\"", "\"first-dense:-1\"", "3"}) {
    expect_problem(kSource + "[moe]\nlayers = " + wrong + "\n",
                   "moe.layers: \"all\", \"every:2\", \"first-dense:1\" or a list");
  }
  for (const std::string good : {"\"\"", "\"5\"", "\"3|4|4|12\""}) {
    const std::string found = problem(kSource + "[parallel]\nlayout = " + good + "\n");
    EXPECT_EQ(found.find("numbers of layers"), std::string::npos) << found;
  }
  for (const std::string wrong : {"[3, 4]", "\"3|\"", "\"|3\"", "\"3||4\"", "\"3,4\"", "\"three\"", "\"3 | 4\""}) {
    expect_problem(kSource + "[parallel]\nlayout = " + wrong + "\n", "parallel.layout: numbers of layers such as \"3|4|4|3\" are expected");
  }
  expect_problem(kSource + "[parallel]\nlayout = \"3|0|3\"\n", "entry 2 of \"3|0|3\" is 0: every chunk needs at least one layer");
  expect_problem(kSource + "[moe]\nlayers = [1, 1]\n", "layer 1 is listed twice");
  expect_problem(kSource + "[moe]\nlayers = [0, -1]\n", "entry 2: -1 is less than 0");
  expect_problem(kSource + "[moe]\nlayers = []\n", "the list is empty");
  expect_problem(kSource + "[data]\ntrain = \"text\"\n", "for one data set write [[1.0, \"text\"]]");
  expect_problem(kSource + "[data]\ntrain = 3\n", "\"mock\" or a list such as");
  expect_problem(kSource + "[data]\ntrain = [[1.0, \"a\"], [\"b\", 1.0]]\n",
                 "entry 2: [weight, \"prefix\"] is expected");
  expect_problem(kSource + "[data]\ntrain = [[0, \"a\"]]\n", "entry 1: weight: 0 must be more than 0");
  expect_problem(kSource + "[data]\ntrain = [[1, \"\"]]\n", "entry 1: the prefix is empty");
}

TEST(RunFile, UnknownKeysAreErrorsWithASuggestion) {
  expect_problem(kSource + "[train]\n  stesp = 3\n",
                 "run.toml:4:3: unknown key 'train.stesp'; did you mean 'train.steps'?");
  expect_problem(kSource + "[train]\nmicro-batch = 3\n", "did you mean 'train.micro_batch'?");
  expect_problem(kSource + "[train]\nlr = 3\n", "unknown key 'train.lr'; did you mean 'optimizer.lr'?");
  expect_problem(kSource + "[trian]\nsteps = 3\n", "run.toml:3:2: unknown section [trian]; did you mean 'train'?");
  expect_problem("steps = 3\n" + kSource, "run.toml:1:1: unknown section [steps]; did you mean 'train.steps'?");
  expect_problem("train = 3\n" + kSource, "run.toml:1:1: [train] is a section, not a key");
  const std::string hopeless = problem(kSource + "[train]\nxyzzy_plugh = 3\n");
  EXPECT_EQ(hopeless, "run.toml:4:1: unknown key 'train.xyzzy_plugh'");
}

TEST(RunFile, AllProblemsAreReportedAtOnce) {
  const std::string found =
      problem("[train]\nsteps = true\nmicro_bach = 2\n[optimizer]\nlr = -1\n", {"train.sequence=zero"});
  EXPECT_NE(found.find("run.toml: 5 problems"), std::string::npos) << found;
  for (const std::string part :
       {"run.toml:2:9: train.steps", "run.toml:3:1: unknown key 'train.micro_bach'", "run.toml:5:6: optimizer.lr",
        "--set train.sequence=zero: train.sequence: an integer is expected, not the string \"zero\"",
        "run.toml: source.model: give source.model"}) {
    EXPECT_NE(found.find(part), std::string::npos) << part << " in\n" << found;
  }
}

TEST(RunFile, SyntaxErrorsHaveAPlace) {
  expect_problem("[train]\nsteps = \n", "run.toml:2:9: not TOML: ");
  expect_problem("[train]\nsteps = 1\nsteps = 2\n", "cannot redefine existing integer 'steps'");
}

TEST(RunFile, FieldsAreHeldAgainstEachOther) {
  expect_problem("[train]\nsteps = 3\n",
                 "run.toml: source.model: give source.model (a directory with weights), source.architecture");
  expect_problem(kSource + "[train]\nglobal_batch = 8\nmicro_batch = 3\n",
                 "run.toml:5:15: train.micro_batch = 3 does not divide train.global_batch = 8: 2 or 4 would");
  expect_problem(kSource + "[optimizer]\nmin_lr = 1.0\n", "optimizer.min_lr = 1 is more than optimizer.lr = 0.0001");
  expect_problem(kSource + "[optimizer]\nwarmup = 2000\n",
                 "run.toml:4:10: optimizer.warmup = 2000 is more than train.steps = 1000");
  expect_problem(kSource, "--set optimizer.warmup=20: optimizer.warmup = 20 is more than train.steps = 10",
                 {"train.steps=10", "optimizer.warmup=20"});
  expect_problem(kSource + "[optimizer]\nschedule = \"wsd\"\n",
                 "optimizer.decay = 0: schedule \"wsd\" needs at least 1 step");
  expect_problem(kSource + "[optimizer]\ndecay = 5\n", "optimizer.decay = 5: only schedule \"wsd\" has a descent");
  expect_problem(kSource + "[optimizer]\nschedule = \"wsd\"\nwarmup = 600\ndecay = 500\n",
                 "optimizer.decay = 500 is more than the 400 steps");
  expect_problem(kSource + "[data]\nsplit = [0, 0, 0]\n", "data.split = [0, 0, 0]: at least one share");
  expect_problem(kSource + "[moe]\nexperts = 4\ntop_k = 8\n", "moe.top_k = 8 is more than moe.experts = 4");
  expect_problem(kSource + "[balance]\npad_to_capacity = true\n",
                 "balance.pad_to_capacity = true needs balance.capacity_factor > 0");
  expect_problem(kSource + "[parallel]\nvirtual_stages = 2\n",
                 "parallel.virtual_stages = 2 needs parallel.pipeline > 1");
  const std::string four = kSource + "[parallel]\npipeline = 4\nlayout = ";
  expect_problem(four + "\"3|4|3\"\n", "run.toml:5:10: parallel.layout names 3 chunks, but pipeline 4 x virtual_stages 1 makes 4");
  expect_problem(four + "\"3|4|4|3\"\ncount_loss = true\n", "parallel.layout says where every layer goes");
}

TEST(Overrides, ReplaceTheFileAndSaySo) {
  const RunConfig run =
      parse_run(kSource + "[train]\nsteps = 5\n", "run.toml",
                {"train.steps=10", "run.name=2024", "optimizer.lr=1e-3", "data.train=mock", "moe.layers=every:2",
                 "source.model='a b'", "upcycle.certify=false", "data.validation=[[1, \"x=y\"]]"});
  EXPECT_EQ(run.train.steps, 10);
  EXPECT_EQ(run.run.name, "2024");
  EXPECT_EQ(run.run.directory, "runs/2024");
  EXPECT_EQ(run.optimizer.lr, 1e-3);
  EXPECT_EQ(run.data.train, (std::vector<Blend>{{1.0, "mock"}}));
  EXPECT_EQ(run.data.validation, (std::vector<Blend>{{1.0, "x=y"}}));
  EXPECT_EQ(run.moe.layers_text, "every:2");
  EXPECT_TRUE(run.moe_given);
  EXPECT_EQ(run.source.model, "a b");
  EXPECT_FALSE(run.upcycle.certify);
  EXPECT_EQ(run.origins.at("train.steps"), "--set");
}

TEST(Overrides, ProblemsNameTheOverride) {
  expect_problem(kSource, "--set train.stesp=3: unknown key 'train.stesp'; did you mean 'train.steps'?",
                 {"train.stesp=3"});
  expect_problem(kSource, "--set train.steps: section.key=value is expected", {"train.steps"});
  expect_problem(kSource, "--set steps=3: section.key=value is expected", {"steps=3"});
  expect_problem(kSource, "--set trian.steps=3: unknown key 'trian.steps'; did you mean 'train.steps'?",
                 {"trian.steps=3"});
  expect_problem(kSource, "--set train.steps=true: train.steps: an integer is expected, not the boolean true",
                 {"train.steps=true"});
  expect_problem(kSource, "train.steps: an integer is expected, not the string", {"train.steps=1\nvalue2 = 2"});
}

TEST(ReadRun, NamesAFileThatIsNotThere) {
  try {
    read_run("/nowhere/run.toml");
    FAIL();
  } catch (const UserError& error) {
    EXPECT_STREQ(error.what(), "/nowhere/run.toml: cannot be opened; a run file (TOML) is expected");
  }
}

}  // namespace
}  // namespace upcycle
