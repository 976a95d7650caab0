#include "train/passes.hpp"

#include <gtest/gtest.h>

#include "unit/data/indexed_files.hpp"

namespace upcycle {
namespace {

class PassesTest : public testing::Test {
 protected:
  PassesTest() {
    // 10 documents of 16 tokens and one of 1: 10 samples; 41 tokens: 2 samples.
    Documents large(10, std::vector<int64_t>(16, 1)), small(1, std::vector<int64_t>(41, 2));
    large.push_back({1});
    run_.data.train = {{3.0, write_documents(scratch_, large, "large")}, {1.0, write_documents(scratch_, small, "small")}};
    run_.train.sequence = 16, run_.train.global_batch = 4;
  }
  std::string problem(int64_t steps, double epochs) {
    run_.train.steps = steps, run_.data.epochs = epochs;
    return too_many_passes(run_, sampler());
  }
  Sampler sampler() const { return Sampler(run_.data.train, {1, 0, 0}, Split::train, 16, 10, 1); }

  Scratch scratch_;
  RunConfig run_;
};

// In four samples, three are of the large one and one of the small one.
TEST_F(PassesTest, NoDataSetIsPassedMoreOftenThanAllowed) {
  EXPECT_EQ(problem(1'000'000, 0), "") << "no limit";
  EXPECT_EQ(problem(2, 1), "");
  EXPECT_EQ(problem(3, 1.5), "");
  EXPECT_EQ(problem(0, 0.001), "");
  const std::string large = (scratch_ / "large").string(), small = (scratch_ / "small").string();
  EXPECT_EQ(problem(3, 1),
            "data.epochs = 1, but train.steps = 3 of train.global_batch = 4 samples pass over data more often:\n  " + small +
                " has 2 samples of train.sequence = 16; the run draws 3, 1.5 passes\n"
                "At most train.steps = 2 keeps to it; or raise data.epochs (0: no limit)");
  const std::string both = problem(40, 2);
  EXPECT_NE(both.find(large + " has 10 samples of train.sequence = 16; the run draws 120, 12 passes"), std::string::npos) << both;
  EXPECT_NE(both.find(small + " has 2 samples of train.sequence = 16; the run draws 40, 20 passes"), std::string::npos) << both;
  EXPECT_NE(both.find("At most train.steps = 4 "), std::string::npos) << both;
  EXPECT_EQ(problem(4, 2), "");
  EXPECT_NE(problem(1, 0.1).find("At most train.steps = 0 "), std::string::npos);
}

TEST_F(PassesTest, OfAWholeRun) {
  run_.train.steps = 5;
  run_.data.train.push_back({1.0, "mock"});
  const std::vector<Passes> passes = passes_of(run_, sampler());
  ASSERT_EQ(passes.size(), 3U);
  EXPECT_DOUBLE_EQ(passes[0].drawn, 12);
  EXPECT_DOUBLE_EQ(passes[0].passes(), 1.2);
  EXPECT_DOUBLE_EQ(passes[1].passes(), 2.0);
  EXPECT_EQ(passes[2].samples, 0);
  EXPECT_EQ(passes[2].passes(), 0.0);
}

}  // namespace
}  // namespace upcycle
