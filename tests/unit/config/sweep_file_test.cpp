#include "config/sweep_file.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "support/scratch.hpp"

namespace upcycle {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::Pair;

SweepFile sweep_with(const std::string& rest) {
  return parse_sweep("[sweep]\nbase = \"run.toml\"\ndirectory = \"d\"\n" + rest, "s.toml");
}
std::string refusal(const std::string& rest) {
  return user_error([&] { sweep_with(rest); });
}

TEST(SweepFile, ProductsRunTheLastKeyFastest) {
  const SweepFile sweep = sweep_with("[[arms]]\nmoe.experts = [4, 8]\noptimizer.lr = [1e-3, 1e-4]\n");
  EXPECT_THAT(sweep.arms, ElementsAre(ElementsAre(Pair("moe.experts", "4"), Pair("optimizer.lr", "0.001")),
                                      ElementsAre(Pair("moe.experts", "4"), Pair("optimizer.lr", "0.0001")),
                                      ElementsAre(Pair("moe.experts", "8"), Pair("optimizer.lr", "0.001")),
                                      ElementsAre(Pair("moe.experts", "8"), Pair("optimizer.lr", "0.0001"))));
}

TEST(SweepFile, ZipsWalkTogetherAndBlocksFollowOneAnother) {
  const SweepFile sweep = sweep_with(
      "[set]\ntrain.steps = 9\n[[arms]]\ncombine = \"zip\"\nmoe.experts = [8, 16]\nmoe.granularity = [1, 2]\nmoe.top_k = 2\n"
      "[[arms]]\nmoe.experts = 64\n");
  EXPECT_THAT(sweep.common, ElementsAre(Pair("train.steps", "9")));
  EXPECT_THAT(sweep.arms, ElementsAre(ElementsAre(Pair("moe.experts", "8"), Pair("moe.granularity", "1"), Pair("moe.top_k", "2")),
                                      ElementsAre(Pair("moe.experts", "16"), Pair("moe.granularity", "2"), Pair("moe.top_k", "2")),
                                      ElementsAre(Pair("moe.experts", "64"))));
}

// The key itself knows what one value of it is: betas are a list, a blend is a list of lists.
TEST(SweepFile, ListsThatAreOneValue) {
  const SweepFile sweep = sweep_with("[[arms]]\noptimizer.betas = [0.9, 0.95]\nupcycle.noise = [0, 0.1]\n");
  EXPECT_THAT(sweep.arms, ElementsAre(ElementsAre(Pair("optimizer.betas", "[0.9,0.95]"), Pair("upcycle.noise", "0")),
                                      ElementsAre(Pair("optimizer.betas", "[0.9,0.95]"), Pair("upcycle.noise", "0.1"))));
  EXPECT_THAT(sweep_with("[[arms]]\noptimizer.betas = [[0.9, 0.95], [0.9, 0.99]]\n").arms,
              ElementsAre(ElementsAre(Pair("optimizer.betas", "[0.9,0.95]")), ElementsAre(Pair("optimizer.betas", "[0.9,0.99]"))));
}

TEST(SweepFile, Exclusions) {
  const SweepFile sweep = sweep_with("[[arms]]\nmoe.experts = [4, 8]\nmoe.top_k = [1, 2]\n[[exclude]]\nmoe.experts = 4\nmoe.top_k = 1\n[[exclude]]\nmoe.top_k = 7\n");
  EXPECT_EQ(sweep.arms.size(), 3u);
  EXPECT_THAT(sweep.arms.front(), ElementsAre(Pair("moe.experts", "4"), Pair("moe.top_k", "2")));
}

TEST(SweepFile, SaysWhatIsWrongAndWhere) {
  EXPECT_THAT(refusal("[[arms]]\nmoe.exprts = [4]\n"), testing::AllOf(HasSubstr("s.toml:5:"), HasSubstr("unknown key 'moe.exprts'; did you mean 'moe.experts'?")));
  EXPECT_THAT(refusal("[[arms]]\nmoe.experts = []\n"), HasSubstr("moe.experts = []"));
  EXPECT_THAT(refusal("[[arms]]\nmoe.experts = [4, \"many\"]\n"), HasSubstr("moe.experts"));
  EXPECT_THAT(refusal("[[arms]]\ncombine = \"zip\"\nmoe.experts = [4, 8]\nmoe.top_k = [1, 2, 3]\n"), HasSubstr("lists of one length"));
  EXPECT_THAT(refusal("[[arms]]\ncombine = \"zipp\"\nmoe.experts = [4, 8]\n"), HasSubstr("\"product\" or \"zip\""));
  EXPECT_THAT(refusal("[[arms]]\nmoe.experts = 4\n[[exclude]]\nmoe.experts = 4\n"), HasSubstr("[[exclude]] leaves out all 1"));
  EXPECT_THAT(refusal(""), HasSubstr("no arm is left: write [[arms]]"));
  EXPECT_THAT(refusal("[[arms]]\nmoe.experts = [4, 4]\n"), HasSubstr("two arms have the same settings: moe.experts = 4"));
  EXPECT_THAT(refusal("[set]\nmoe.experts = 4\n[[arms]]\nmoe.experts = [8]\n"), HasSubstr("moe.experts is in [set]"));
  EXPECT_THAT(refusal("[[arms]]\nrun.seed = [1, 2]\n"), HasSubstr("set by the sweep itself"));
  EXPECT_THAT(refusal("[sweeep]\n"), HasSubstr("did you mean 'sweep'?"));
  EXPECT_THAT(user_error([] { parse_sweep("[sweep]\nbase = \"b\"\nmatch = \"flop\"\n", "s.toml"); }), HasSubstr("did you mean 'flops'?"));
  EXPECT_THAT(user_error([] { parse_sweep("[sweep]\nseds = [1]\n", "s.toml"); }), HasSubstr("did you mean 'seeds'?"));
  EXPECT_THAT(user_error([] { parse_sweep("[sweep]\nseeds = [1, 1]\n", "s.toml"); }), HasSubstr("names 1 twice"));
  EXPECT_THAT(user_error([] { parse_sweep("[[arms]]\nmoe.experts = 4\n", "s.toml"); }), HasSubstr("sweep.base is missing"));
  EXPECT_THAT(user_error([] { read_sweep("/nowhere/s.toml"); }), HasSubstr("/nowhere/s.toml: cannot be opened"));
}

}  // namespace
}  // namespace upcycle
