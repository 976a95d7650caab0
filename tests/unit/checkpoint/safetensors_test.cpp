#include "checkpoint/safetensors.hpp"

#include <ATen/ops/arange.h>
#include <ATen/ops/equal.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/zeros.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <csignal>

#include "support/scratch.hpp"

namespace upcycle {
namespace {

using testing::HasSubstr;
namespace fs = std::filesystem;

/// A .safetensors file with this header and `data` bytes of zeros.
std::string file_of(const std::string& header, size_t data, uint64_t length_said) {
  std::string out(reinterpret_cast<const char*>(&length_said), sizeof length_said);
  return out + header + std::string(data, '\0');
}
std::string file_of(const std::string& header, size_t data) { return file_of(header, data, header.size()); }

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return "\"" + name + R"(":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets + "}";
}

/// What the reader says of a file with this content. Always with the file's name.
std::string refusal(const std::string& content) {
  const Scratch scratch;
  const fs::path path = store(scratch / "model.safetensors", content);
  const std::string message = user_error([&] { SafetensorsReader{scratch.path()}; });
  if (!message.empty()) EXPECT_THAT(message, HasSubstr(path.string()));
  return message;
}
std::string refusal_of(const std::string& entries, size_t data) { return refusal(file_of("{" + entries + "}", data)); }

TEST(SafetensorsHeader, AcceptsWhatIsRight) {
  EXPECT_EQ(refusal_of(entry("a", "F32", "[2,3]", "[0,24]"), 24), "");
  EXPECT_EQ(refusal_of(entry("b", "BF16", "[]", "[4,6]") + "," + entry("a", "F32", "[1]", "[0,4]") + "," +
                           entry("c", "F16", "[0,9]", "[6,6]") + R"(,"__metadata__":{"format":"pt"})",
                       6),
            "");
  EXPECT_EQ(refusal(file_of("{}      ", 0)), "");
}

TEST(SafetensorsHeader, RefusesWrongLengths) {
  EXPECT_THAT(refusal("abc"), HasSubstr("truncated"));
  EXPECT_THAT(refusal(file_of("{}", 0, 3)), HasSubstr("its header has 3 bytes, but the file has only 10"));
  EXPECT_THAT(refusal(file_of("{}", 0, 100'000'001)), HasSubstr("100000001"));
  EXPECT_THAT(refusal(file_of("{}", 0, UINT64_MAX)), HasSubstr("18446744073709551615"));
}

TEST(SafetensorsHeader, RefusesWhatIsNotAHeader) {
  EXPECT_THAT(refusal(file_of("{\"a\":", 0)), HasSubstr("not valid JSON"));
  EXPECT_THAT(refusal(file_of("[1]", 0)), HasSubstr("not a JSON object"));
  EXPECT_THAT(refusal(file_of(R"({"__metadata__":{"a":1}})", 0)), HasSubstr("__metadata__"));
  EXPECT_THAT(refusal(file_of(R"({"__metadata__":"pt"})", 0)), HasSubstr("__metadata__"));
  EXPECT_THAT(refusal(file_of(R"({"a":3})", 0)), HasSubstr("tensor 'a'"));
  EXPECT_THAT(refusal(file_of(R"({"a":{"dtype":"F32","shape":[1]}})", 4)), HasSubstr("'data_offsets' is missing"));
  EXPECT_THAT(refusal(file_of(R"({"a":{"dtype":"F32","data_offsets":[0,4]}})", 4)), HasSubstr("'shape' is missing"));
  EXPECT_THAT(refusal(file_of(R"({"a":{"shape":[1],"data_offsets":[0,4]}})", 4)), HasSubstr("'dtype' is missing"));
}

TEST(SafetensorsHeader, RefusesNamesThatComeTwice) {
  EXPECT_THAT(refusal_of(entry("a", "F32", "[1]", "[0,4]") + "," + entry("a", "F32", "[1]", "[4,8]"), 8),
              HasSubstr("'a' is there twice"));
  EXPECT_THAT(refusal(file_of(R"({"a":{"dtype":"F32","dtype":"BF16","shape":[1],"data_offsets":[0,4]}})", 4)),
              HasSubstr("'dtype' is there twice"));
}

TEST(SafetensorsHeader, RefusesWrongDtypes) {
  EXPECT_THAT(refusal_of(entry("w", "F31", "[1]", "[0,4]"), 4), HasSubstr("tensor 'w': unknown dtype 'F31'"));
  EXPECT_THAT(refusal(file_of(R"({"w":{"dtype":5,"shape":[1],"data_offsets":[0,4]}})", 4)),
              HasSubstr("dtype 5 is not a string"));
}

TEST(SafetensorsHeader, RefusesWrongOffsets) {
  for (const char* offsets :
       {"[-4,0]", "[0.0,4]", "[0,4.5]", "[0,18446744073709551616]", "[0,1e30]", "[\"0\",4]", "[null,4]"}) {
    EXPECT_THAT(refusal_of(entry("w", "F32", "[1]", offsets), 4), HasSubstr("tensor 'w': offset")) << offsets;
  }
  for (const char* offsets : {"4", "[4]", "[0,4,8]", "{}"}) {
    EXPECT_THAT(refusal_of(entry("w", "F32", "[1]", offsets), 4), HasSubstr("is not [begin, end]")) << offsets;
  }
  EXPECT_THAT(refusal_of(entry("w", "F32", "[1]", "[4,0]"), 4), HasSubstr("end before they begin"));
  EXPECT_THAT(refusal_of(entry("w", "F32", "[2]", "[0,8]"), 4),
              HasSubstr("tensor 'w' ends at byte 8 of the data, but the file holds only 4"));
  EXPECT_THAT(refusal_of(entry("w", "F32", "[1]", "[18446744073709551612,18446744073709551615]"), 4),
              HasSubstr("tensor 'w'"));
  EXPECT_THAT(refusal_of(entry("v", "F32", "[2]", "[0,8]") + "," + entry("w", "F32", "[2]", "[4,12]"), 12),
              HasSubstr("tensor 'w' begins at byte 4, inside"));
  EXPECT_THAT(refusal_of(entry("v", "F32", "[1]", "[0,4]") + "," + entry("w", "F32", "[1]", "[0,4]"), 4),
              HasSubstr("inside"));
  EXPECT_THAT(refusal_of(entry("v", "F32", "[1]", "[0,4]") + "," + entry("w", "F32", "[1]", "[8,12]"), 12),
              HasSubstr("a hole after byte 4"));
  EXPECT_THAT(refusal_of(entry("w", "F32", "[1]", "[4,8]"), 8), HasSubstr("a hole after byte 0"));
  EXPECT_THAT(refusal_of(entry("w", "F32", "[1]", "[0,4]"), 9), HasSubstr("5 bytes after the last tensor"));
}

TEST(SafetensorsHeader, RefusesWrongShapes) {
  EXPECT_THAT(refusal_of(entry("w", "F32", "[3]", "[0,8]"), 8),
              HasSubstr("are 8 bytes, but shape [3] of F32 takes 12"));
  EXPECT_THAT(refusal_of(entry("w", "BF16", "[2]", "[0,8]"), 8), HasSubstr("takes 4"));
  EXPECT_THAT(refusal_of(entry("w", "F32", "[-1,-2]", "[0,8]"), 8), HasSubstr("size in shape -1"));
  EXPECT_THAT(refusal_of(entry("w", "F32", "[1.5]", "[0,6]"), 6), HasSubstr("size in shape 1.5"));
  EXPECT_THAT(refusal_of(entry("w", "F32", "2", "[0,8]"), 8), HasSubstr("is not a list"));
  // 2^32 * 2^32 * 4 is 0 in 64 bits, 2^63 is no int64.
  EXPECT_THAT(refusal_of(entry("w", "F32", "[4294967296,4294967296]", "[0,0]"), 0), HasSubstr("more than 2^64 bytes"));
  EXPECT_THAT(refusal_of(entry("w", "U8", "[9223372036854775808,0]", "[0,0]"), 0), HasSubstr("more than 2^64 bytes"));
}

TEST(SafetensorsReader, RefusesDirectoriesThatMissSomething) {
  const Scratch scratch;
  const auto message = [&] { return user_error([&] { SafetensorsReader{scratch.path()}; }); };
  const fs::path index = scratch / "model.safetensors.index.json";
  EXPECT_THAT(user_error([&] { SafetensorsReader{scratch / "absent"}; }), HasSubstr("no such file"));
  EXPECT_THAT(message(), HasSubstr("neither model.safetensors nor"));
  store(index, "{");
  EXPECT_THAT(message(), HasSubstr("not valid JSON"));
  store(index, "{}");
  EXPECT_THAT(message(), HasSubstr("weight_map"));
  store(index, R"({"weight_map":{"a":1}})");
  EXPECT_THAT(message(), HasSubstr("tensor 'a': the shard 1 is not a file name"));
  store(index, R"({"weight_map":{"a":"x","a":"y"}})");
  EXPECT_THAT(message(), HasSubstr("'a' is there twice"));
  for (const char* shard : {"../x", "/etc/passwd", "", ".."}) {
    store(index, std::string(R"({"weight_map":{"a":")") + shard + "\"}}");
    EXPECT_THAT(message(), HasSubstr("not a plain file name")) << shard;
  }
  store(index, R"({"weight_map":{"a":"one.safetensors","b":"two.safetensors"}})");
  store(scratch / "one.safetensors", file_of("{" + entry("a", "F32", "[1]", "[0,4]") + "}", 4));
  EXPECT_THAT(message(), HasSubstr("two.safetensors: this shard is missing"));

  const std::string two = file_of("{" + entry("b", "F32", "[1]", "[0,4]") + "}", 4);
  store(scratch / "two.safetensors", two.substr(0, two.size() - 1));
  EXPECT_THAT(message(), testing::AllOf(HasSubstr("two.safetensors"), HasSubstr("tensor 'b'"), HasSubstr("truncated")));
  store(scratch / "two.safetensors", two);
  EXPECT_EQ(message(), "");
  store(scratch / "two.safetensors", file_of("{" + entry("a", "F32", "[1]", "[0,4]") + "}", 4));
  EXPECT_THAT(message(), HasSubstr("tensor 'a' is in"));
}

TEST(SafetensorsReader, RefusesAnIndexThatDisagrees) {
  const Scratch scratch;
  store(scratch / "one.safetensors",
        file_of("{" + entry("a", "F32", "[1]", "[0,4]") + "," + entry("extra", "F32", "[1]", "[4,8]") + "}", 8));
  store(scratch / "two.safetensors", file_of("{" + entry("b", "F32", "[1]", "[0,4]") + "}", 4));
  store(scratch / "model.safetensors.index.json",
        R"({"weight_map":{"a":"two.safetensors","b":"two.safetensors","c":"one.safetensors"}})");
  const std::string message = user_error([&] { SafetensorsReader{scratch.path()}; });
  EXPECT_THAT(message, HasSubstr("tensor 'a' is in one.safetensors, not in two.safetensors"));
  EXPECT_THAT(message, HasSubstr("tensor 'c' is not in one.safetensors"));
  EXPECT_THAT(message, HasSubstr("tensor 'extra' of one.safetensors is not in the index"));
}

/// Items of several dtypes and ranks, and their values.
std::vector<std::pair<SafetensorsWriter::Item, Tensor>> some_tensors() {
  std::vector<std::pair<SafetensorsWriter::Item, Tensor>> out;
  const auto add = [&](const std::string& name, at::ScalarType dtype, const Shape& shape) {
    out.push_back({{name, dtype, shape}, at::randn(shape).to(dtype)});
  };
  add("odd.bf16", at::kBFloat16, {3});  // 6 bytes: what follows it would not be aligned in the list's order
  add("wide", at::kFloat, {2, 3, 5});
  add("scalar", at::kFloat, {});
  add("empty", at::kHalf, {0, 4});
  add("half", at::kHalf, {7, 2});
  return out;
}

void write_all(const fs::path& directory, uint64_t max_shard_bytes) {
  const auto tensors = some_tensors();
  std::vector<SafetensorsWriter::Item> items;
  for (const auto& [item, value] : tensors) items.push_back(item);
  SafetensorsWriter writer(directory, items, max_shard_bytes, {{"format", "pt"}});
  for (const auto& [item, value] : tensors) writer.write(value);
  writer.finish();
}

TEST(SafetensorsWriter, RoundTripInOneFileAndInShards) {
  for (const uint64_t max_bytes : {1'000'000, 40, 1}) {
    const Scratch scratch;
    at::manual_seed(3);
    write_all(scratch.path(), max_bytes);
    EXPECT_EQ(fs::exists(scratch / "model.safetensors.index.json"), max_bytes < 1000);
    const SafetensorsReader reader(scratch.path());
    at::manual_seed(3);
    for (const auto& [item, value] : some_tensors()) {
      ASSERT_TRUE(reader.contains(item.name));
      EXPECT_EQ(reader.entries().at(item.name).begin % c10::elementSize(item.dtype), 0u) << "not aligned";
      EXPECT_TRUE(at::equal(reader.read(item.name), value)) << item.name;
      EXPECT_EQ(reader.read(item.name).scalar_type(), item.dtype);
    }
    for (const auto& file : fs::directory_iterator(scratch.path())) EXPECT_NE(file.path().extension(), ".partial");
    EXPECT_EQ(SafetensorsReader(reader.files().front()).files().size(), 1u);  // a file by itself
  }
}

TEST(SafetensorsReader, ReadsEveryBox) {
  const Scratch scratch;
  const Tensor value = at::arange(4 * 5 * 6, at::kFloat).reshape({4, 5, 6});
  SafetensorsWriter writer(scratch.path(), {{"w", at::kFloat, {4, 5, 6}}}, 1 << 20, {});
  writer.write(value.transpose(0, 2).contiguous().transpose(0, 2));  // strided
  writer.finish();
  const SafetensorsReader reader(scratch.path());
  for (int64_t a = 0; a < 4; ++a)
    for (int64_t b = 0; b < 5; ++b)
      for (int64_t c = 0; c < 6; ++c)
        for (const Shape& size :
             {Shape{4 - a, 5 - b, 6 - c}, Shape{1, 1, 6 - c}, Shape{1, 5 - b, 1}, Shape{4 - a, 0, 1}}) {
          const Tensor expected = value.narrow(0, a, size[0]).narrow(1, b, size[1]).narrow(2, c, size[2]);
          ASSERT_TRUE(at::equal(reader.read("w", {{a, b, c}, size}), expected)) << describe(Box{{a, b, c}, size});
        }
  EXPECT_THROW(reader.read("w", {{0, 0, 1}, {4, 5, 6}}), std::logic_error);
  EXPECT_THAT(user_error([&] { reader.read("nobody"); }), HasSubstr("'nobody'"));
}

TEST(SafetensorsWriter, CastsAndRefusesWhatTheListDoesNotSay) {
  const Scratch scratch;
  const auto path = scratch / "out";
  {
    SafetensorsWriter writer(path, {{"a", at::kBFloat16, {2}}, {"b", at::kFloat, {1}}}, 1 << 20, {});
    EXPECT_THROW(writer.write(at::zeros({3})), std::logic_error);
    writer.write(at::arange(2, at::kFloat));
    EXPECT_THROW(writer.finish(), std::logic_error);
    writer.write(at::zeros({1}));
    EXPECT_THROW(writer.write(at::zeros({1})), std::logic_error);
  }
  EXPECT_TRUE(fs::is_empty(path)) << "an unfinished writer leaves nothing";
  EXPECT_THROW(SafetensorsWriter(path, {{"a", at::kFloat, {2}}, {"a", at::kFloat, {1}}}, 1, {}), std::logic_error);
  EXPECT_THROW(SafetensorsWriter(path, {{"a", at::kComplexFloat, {2}}}, 1, {}), std::logic_error);
}

TEST(SafetensorsWriter, AFullDiskIsTheUsersErrorAndLeavesNothing) {
  const Scratch scratch;
  struct rlimit before {};
  getrlimit(RLIMIT_FSIZE, &before);
  const struct rlimit small { 10'000, before.rlim_max };
  std::signal(SIGXFSZ, SIG_IGN);  // then write() fails like on a full disk
  std::string message;
  {
    SafetensorsWriter writer(scratch.path(), {{"a", at::kFloat, {10'000}}}, 1 << 20, {});
    setrlimit(RLIMIT_FSIZE, &small);
    message = user_error([&] { writer.write(at::zeros({10'000})); });
    setrlimit(RLIMIT_FSIZE, &before);
  }
  EXPECT_THAT(message, HasSubstr("model.safetensors.partial: File too large"));
  EXPECT_TRUE(fs::is_empty(scratch.path()));
  EXPECT_THAT(user_error([&] { SafetensorsWriter(store(scratch / "file", "") / "below", {}, 1, {}); }),
              HasSubstr("creating"));
}

}  // namespace
}  // namespace upcycle
