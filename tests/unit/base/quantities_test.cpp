#include "base/quantities.hpp"

#include <gtest/gtest.h>

namespace upcycle {
namespace {

TEST(Quantities, ArePlainForPeople) {
  EXPECT_EQ(gigabytes(uint64_t{121'349'000'000}), "121.3 GB");
  EXPECT_EQ(gigabytes(uint64_t{4'000'000}, 3), "0.004 GB");
  EXPECT_EQ(parameter_count(89'650'000'000), "89.65 B");
  EXPECT_EQ(parameter_count(5'380'000), "5.38 M");
}

TEST(Quantities, HaveFourDigitsAndThePrefixThatFits) {
  EXPECT_EQ(with_prefix(0), "0 ");
  EXPECT_EQ(with_prefix(512), "512 ");
  EXPECT_EQ(with_prefix(999.96), "1.000 k") << "not 1000";
  EXPECT_EQ(with_prefix(89'650'000'000.0), "89.65 G");
  EXPECT_EQ(with_prefix(99'996), "100.0 k");
  EXPECT_EQ(with_prefix(2.5e24), "2500.0 Z") << "the last prefix there is";
}

}  // namespace
}  // namespace upcycle
