#include "checkpoint/tensor_file.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include "support/scratch.hpp"

namespace upcycle {
namespace {

using testing::HasSubstr;
namespace fs = std::filesystem;

const std::vector<TensorSpec> kSpecs = {{"model.a", at::kFloat, {3000}}, {"model.b", at::kBFloat16, {2, 4}}};

/// The descriptors that this process has of `path`.
std::vector<int> descriptors_of(const fs::path& path) {
  std::vector<int> out;
  std::error_code gone;   // the one that lists them
  for (const auto& entry : fs::directory_iterator("/proc/self/fd")) {
    if (fs::read_symlink(entry.path(), gone) == path) out.push_back(std::stoi(entry.path().filename()));
  }
  return out;
}

TEST(TensorFile, ValuesAreWhereItSays) {
  const Scratch scratch;
  const Extents extents = TensorFile::create(scratch / "w.h5", kSpecs);
  const std::string made = contents(scratch / "w.h5");
  const std::vector<float> values(3000, 1.5f);
  TensorFile file = TensorFile::open_for_writing(scratch / "w.h5");
  file.dataset("model.a").write({{0}, {3000}}, values.data());
  file.dataset("model.b");   // read when values have been written
  file.close();
  std::string expected = made;
  expected.replace(extents.offsets[0], 12000, reinterpret_cast<const char*>(values.data()), 12000);
  EXPECT_TRUE(contents(scratch / "w.h5") == expected) << "nothing but the values";
  EXPECT_EQ(TensorFile::open(scratch / "w.h5").list().size(), 2u);
}

TEST(TensorFile, ACloseThatFailsIsAnError) {
  const Scratch scratch;
  TensorFile::create(scratch / "w.h5", kSpecs);
  TensorFile file = TensorFile::open_for_writing(scratch / "w.h5");
  for (const int descriptor : descriptors_of(scratch / "w.h5")) ::close(descriptor);   // HDF5's close will fail
  EXPECT_THAT(user_error([&] { file.close(); }), testing::AllOf(HasSubstr("closing"), HasSubstr("w.h5")));
  // And HDF5 must not crash when this process ends.
}

TEST(TensorFile, AnIndexThatCantBeStoredIsTold) {
  const Scratch scratch;
  const std::map<std::string, std::vector<TensorSpec>> parts = {{"w-00001-of-00001.h5", kSpecs}};
  fs::create_symlink("/dev/full", scratch / "w.h5");
  EXPECT_THAT(user_error([&] { TensorFile::create_index(scratch / "w.h5", parts); }), HasSubstr("w.h5: "));
  fs::remove(scratch / "w.h5");
  TensorFile::create_index(scratch / "w.h5", parts);
  TensorFile::create(scratch / "w-00001-of-00001.h5", kSpecs);
  EXPECT_TRUE(TensorFile::open(scratch / "w.h5").contains("model.b"));
}

}  // namespace
}  // namespace upcycle
