#include "train/byte_progress.hpp"

#include <gtest/gtest.h>

namespace upcycle {
namespace {

TEST(ProgressLine, BytesRateAndWhatIsLeft) {
  EXPECT_EQ(progress_line("exporting", 1.2e9, 3.4e9, 1 / 512e6), "exporting: 1.20 of 3.40 GB, 35 %, 512 MB/s, 5 s left");
  EXPECT_EQ(progress_line("exporting", 0, 3.4e9, 0), "exporting: 0.00 of 3.40 GB, 0 %");
  EXPECT_EQ(progress_line("exporting", 999e6, 999e6, 1 / 10e6), "exporting: 999 of 999 MB, 100 %, 10 MB/s, 0 s left");
  EXPECT_EQ(progress_line("exporting", 1e9, 181e9, 1e-9), "exporting: 1.00 of 181.00 GB, 0 %, 1000 MB/s, 3 min left");
  EXPECT_EQ(progress_line("exporting", 0, 0, 0), "exporting: 0 of 0 MB, 100 %");
}

}  // namespace
}  // namespace upcycle
