#include "checkpoint/manifest.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "checkpoint/digest.hpp"
#include "checkpoint/writer.hpp"
#include "support/scratch.hpp"

namespace upcycle {
namespace {

using testing::HasSubstr;
namespace fs = std::filesystem;

/// A checkpoint of one text file.
fs::path write_step(const fs::path& folder, int64_t step, const nlohmann::json& training = nullptr) {
  const Communicator alone;
  CheckpointWriter writer(folder / step_directory(step), alone);
  writer.add_text("note.txt", "step " + std::to_string(step));
  writer.commit({.run_id = "test", .step = step, .training = training});
  return folder / step_directory(step);
}

std::set<std::string> names_in(const fs::path& folder) {
  std::set<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder)) names.insert(entry.path().filename().string());
  return names;
}

TEST(Manifest, ReadsBackWhatWasWritten) {
  const Scratch scratch;
  const Communicator alone;
  CheckpointWriter writer(scratch / "step-00000003", alone);
  writer.add_text("note.txt", "four");
  writer.commit({.run_id = "abc",
                 .step = 3,
                 .architecture = {{"hidden_size", 8}},
                 .run = {{"a", 1}},
                 .provenance = {{"b", 2}},
                 .training = {{"c", 3}},
                 .layout = {{"ranks", 1}}});
  const Manifest manifest = read_manifest(scratch / "step-00000003");
  EXPECT_EQ(manifest.schema_version, kSchemaVersion);
  EXPECT_EQ(manifest.run_id, "abc");
  EXPECT_EQ(manifest.step, 3);
  EXPECT_EQ(manifest.architecture["hidden_size"], 8);
  EXPECT_EQ(manifest.training["c"], 3);
  EXPECT_EQ(manifest.files, (nlohmann::json{{"note.txt", 4}}));
  EXPECT_EQ(contents(scratch.path() / "step-00000003" / "note.txt"), "four");
}

TEST(Manifest, ACheckpointUnderTheNameOfAnotherStepIsNone) {
  const Scratch scratch;
  const fs::path first = write_step(scratch.path(), 1);
  fs::copy(first, scratch / step_directory(9), fs::copy_options::recursive);
  std::vector<std::string> why;
  EXPECT_EQ(newest_checkpoint(scratch.path(), &why), first);
  ASSERT_EQ(why.size(), 1u);
  EXPECT_THAT(why[0], HasSubstr("step-00000009: its manifest is of step 1"));
  EXPECT_EQ(valid_checkpoints(scratch.path(), 100), std::vector<fs::path>{first});
  fs::rename(scratch / step_directory(9), scratch / "best");
  EXPECT_EQ(newest_checkpoint(scratch / "best"), scratch / "best") << "any other name is a name";
}

TEST(Manifest, RefusesWhatItCannotRead) {
  const Scratch scratch;
  const fs::path step = write_step(scratch.path(), 1);
  const std::string good = contents(step / "manifest.json");
  const auto message = [&](const std::string& content) {
    store(step / "manifest.json", content);
    const std::string said = user_error([&] { read_manifest(step); });
    EXPECT_THAT(said, HasSubstr((step / "manifest.json").string()));
    return said;
  };
  const auto with_version = [&](const std::string& version) {
    std::string changed = good;
    return message(changed.replace(changed.find("\"schema_version\": 3"), 19, "\"schema_version\": " + version));
  };
  EXPECT_THAT(user_error([&] { read_manifest(scratch.path()); }), HasSubstr("not a checkpoint"));
  EXPECT_THAT(message(good.substr(0, good.size() / 2)), HasSubstr("not valid JSON"));
  EXPECT_THAT(message("[]"), HasSubstr("no 'schema_version'"));
  EXPECT_THAT(message("{}"), HasSubstr("no 'schema_version'"));
  EXPECT_THAT(with_version("\"one\""), HasSubstr("no 'schema_version'"));
  EXPECT_THAT(with_version("99"), HasSubstr("schema version 99, but this program reads versions 1 to 3 only"));
  EXPECT_THAT(with_version("3, \"schema_version\": 1"), HasSubstr("'schema_version' is there twice"));
  EXPECT_THAT(message(R"({"schema_version":1,"step":0})"), HasSubstr("run_id"));
  EXPECT_THAT(message(R"({"schema_version":1,"run_id":5,"step":0})"), HasSubstr("string"));
  EXPECT_THAT(message(R"({"schema_version":3,"run_id":5})"), HasSubstr("its digest does not fit"));
  for (const char* step : {"-1", "1.5", "1e300", "true", "null", "\"1\"", "9223372036854775808"})
    EXPECT_THAT(message(text(R"({"schema_version":1,"run_id":"a","step":)", step, "}")), HasSubstr(", no number of a step")) << step;
  const std::string deep = std::string(200'000, '[') + std::string(200'000, ']');
  EXPECT_THAT(message("{\"schema_version\":1,\"run\":" + deep + "}"), HasSubstr("nested deeper than 100 levels"));
}

TEST(Manifest, NoFlippedBitGoesUnnoticed) {
  const Scratch scratch;
  const fs::path step = write_step(scratch.path(), 1);
  const std::string good = contents(step / "manifest.json");
  for (size_t byte = 0; byte < good.size(); ++byte) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string bad = good;
      bad[byte] = static_cast<char>(bad[byte] ^ (1 << bit));
      store(step / "manifest.json", bad);
      EXPECT_NE(user_error([&] { read_manifest(step); }), "") << "bit " << bit << " of byte " << byte;
    }
  }
}

TEST(Manifest, FilesMustBeThereWithTheirSizes) {
  const Scratch scratch;
  const fs::path step = write_step(scratch.path(), 1);
  const Manifest manifest = read_manifest(step);
  const auto message = [&](const Manifest& m) { return user_error([&] { check_complete(step, m); }); };
  EXPECT_EQ(message(manifest), "");
  store(step / "note.txt", "longer than before");
  EXPECT_THAT(message(manifest), HasSubstr("note.txt: has 18 bytes, but the manifest says 6"));
  fs::remove(step / "note.txt");
  EXPECT_THAT(message(manifest), HasSubstr("note.txt: No such file"));
  Manifest wrong = manifest;
  wrong.files["note.txt"] = -1;
  EXPECT_THAT(message(wrong), HasSubstr("the size of 'note.txt' is -1"));
  for (const char* name : {"../step-00000001/note.txt", "/dev/null", "a/../../b", ""}) {
    wrong.files = {{name, 0}};
    EXPECT_THAT(message(wrong), HasSubstr("which is no file of this checkpoint")) << name;
  }
  wrong.files = {{std::string("note.txt\0x", 10), 18}};
  EXPECT_THAT(message(wrong), HasSubstr("note.txt\\u0000x\", which is no file of this checkpoint"));
  wrong.files = 3;
  EXPECT_THAT(message(wrong), HasSubstr("'files' is not an object"));
  wrong = manifest;
  store(step / "note.txt", "step 1");
  for (const char* tensors : {"5", "[]", "null"}) {
    wrong.tensors = nlohmann::json::parse(tensors);
    EXPECT_THAT(message(wrong), HasSubstr("'tensors' is not an object")) << tensors;
  }
  for (const char* summary : {"5", R"({"parts": 5})", R"({"parts": [5]})", R"({"parts": ["absent.h5"]})"}) {
    wrong.tensors = {{"weights.h5", nlohmann::json::parse(summary)}};
    EXPECT_THAT(message(wrong), HasSubstr("of 'weights.h5' is no summary, or has parts")) << summary;
  }
}

TEST(Manifest, TextsMustBeWhatWasWritten) {
  const Scratch scratch;
  const fs::path older = write_step(scratch.path(), 1), step = write_step(scratch.path(), 2);
  const Manifest manifest = read_manifest(step);
  EXPECT_EQ(manifest.texts.size(), 1u);
  const auto message = [&](const Manifest& m) { return user_error([&] { check_complete(step, m); }); };
  EXPECT_EQ(message(manifest), "");
  store(step / "note.txt", "step 3");   // as long as it was
  EXPECT_THAT(message(manifest), HasSubstr("step-00000002/note.txt: is not what was written"));
  std::vector<std::string> why;
  EXPECT_EQ(newest_checkpoint(scratch.path(), &why), older);
  EXPECT_THAT(why, testing::ElementsAre(HasSubstr("note.txt: is not what was written")));
  Manifest before = manifest;
  before.schema_version = 2;   // which had no digests
  EXPECT_EQ(message(before), "");

  write_step(scratch.path(), 2);   // it is out of the way, and not gone
  EXPECT_EQ(newest_checkpoint(scratch.path()), step);
  EXPECT_EQ(contents(scratch.path() / "step-00000002.damaged-1/note.txt"), "step 3");

  Manifest without = manifest;
  without.texts = nlohmann::json::object();
  EXPECT_THAT(message(without), HasSubstr("note.txt: is not what was written")) << "a text without a digest could be any";
  without.texts = nlohmann::json::array();
  EXPECT_THAT(message(without), HasSubstr("'texts' is not an object"));
  EXPECT_THAT(user_error([&] {
                nlohmann::json written = to_json(manifest);
                written.erase("texts");
                written["digest"] = digest_of(written.dump());
                store(step / kManifestFile, written.dump());
                read_manifest(step);
              }),
              HasSubstr("texts"));
}

TEST(Steps, Names) {
  EXPECT_EQ(step_directory(100), "step-00000100");
  EXPECT_EQ(step_directory(1'234'567'890), "step-1234567890");
  EXPECT_EQ(step_of("step-00000100"), 100);
  EXPECT_EQ(step_of(step_directory(1'234'567'890)), 1'234'567'890);
  for (const char* name :
       {"step-", "step-100", "step-00000100.partial", "step-0000010x", "stop-00000100", "step-99999999999999999999"}) {
    EXPECT_EQ(step_of(name), std::nullopt) << name;
  }
}

TEST(NewestCheckpoint, IsTheNewestThatIsWhole) {
  const Scratch scratch;
  const fs::path steps = scratch / "checkpoints";
  EXPECT_EQ(newest_checkpoint(scratch.path()), std::nullopt);
  EXPECT_EQ(newest_checkpoint(scratch / "absent"), std::nullopt);
  for (const int64_t step : {0, 9, 10, 200}) write_step(steps, step);
  fs::create_directory(steps / "step-00000300.partial");
  for (const fs::path& path : {scratch.path(), steps, steps / "step-00000200"})
    EXPECT_EQ(newest_checkpoint(path), steps / "step-00000200");
  EXPECT_EQ(newest_checkpoint(steps / "step-00000009"), steps / "step-00000009");

  store(steps / "step-00000200" / "note.txt", "");
  fs::remove(steps / "step-00000010" / "manifest.json");
  std::vector<std::string> why;
  EXPECT_EQ(newest_checkpoint(scratch.path(), &why), steps / "step-00000009");
  EXPECT_THAT(why, testing::ElementsAre(HasSubstr("step-00000200/note.txt: has 0 bytes"),
                                        HasSubstr("step-00000010: not a checkpoint")));
  EXPECT_EQ(newest_checkpoint(steps / "step-00000200"), std::nullopt);
}

TEST(Retention, KeepsTheNewestAndEveryNth) {
  const Scratch scratch;
  for (const int64_t step : {0, 10, 20, 30, 40, 50, 60}) write_step(scratch.path(), step);
  store(scratch.path() / "step-00000060" / "note.txt", "");
  fs::create_directory(scratch / "step-00000005.removed");  // of a removal that was killed
  store(scratch / "mine.txt", "");

  EXPECT_EQ(remove_old(scratch.path(), 2, 20).size(), 2u);
  EXPECT_EQ(names_in(scratch.path()), (std::set<std::string>{"step-00000000", "step-00000020", "step-00000040",
                                                             "step-00000050", "step-00000060", "mine.txt"}));
  EXPECT_TRUE(remove_old(scratch.path(), 2, 20).empty());
  EXPECT_EQ(remove_old(scratch.path(), 0, 0).size(), 3u);
  EXPECT_EQ(newest_checkpoint(scratch.path()), scratch / "step-00000050") << "the newest valid one never goes";
}

TEST(Retention, KeepsTheBestWhateverIsNewer) {
  const Scratch scratch;
  const auto validated = [&](int64_t step, const nlohmann::json& loss) { write_step(scratch.path(), step, {{"validation_loss", loss}}); };
  write_step(scratch.path(), 0);   // was never validated
  validated(10, 3.5), validated(20, 3.25), validated(30, 3.25), validated(40, nullptr), validated(50, 3.75);
  validated(5, 1.0);
  store(scratch.path() / "step-00000005" / "note.txt", "");   // damaged: the best of all, and none
  EXPECT_EQ(best_checkpoint(valid_checkpoints(scratch.path(), 1000)), scratch / "step-00000030") << "the newer of equals";
  EXPECT_EQ(best_checkpoint({scratch / "step-00000000", scratch / "step-00000040"}), std::nullopt);

  EXPECT_EQ(remove_old(scratch.path(), 1, 0, /*keep_best=*/true).size(), 4u);
  EXPECT_EQ(names_in(scratch.path()), (std::set<std::string>{"step-00000005", "step-00000030", "step-00000050"}));
  validated(60, 3.0);   // a better one: that of step 30 is one of many now
  EXPECT_EQ(remove_old(scratch.path(), 1, 0, true).size(), 2u);
  EXPECT_EQ(names_in(scratch.path()), (std::set<std::string>{"step-00000005", "step-00000060"}));
  validated(70, 4.0), validated(80, 5.0);
  EXPECT_EQ(remove_old(scratch.path(), 1, 0, false).size(), 2u) << "not asked for";
}

TEST(Retention, TakesBackWhatIsAfterAStep) {
  const Scratch scratch;
  for (const int64_t step : {0, 10, 20, 30, 40}) write_step(scratch.path(), step);
  store(scratch.path() / "step-00000040" / "note.txt", "");   // no checkpoint, and not ours to delete
  EXPECT_EQ(valid_checkpoints(scratch.path(), 20), (std::vector<fs::path>{scratch / "step-00000010", scratch / "step-00000000"}));
  EXPECT_EQ(remove_after(scratch.path(), 15).size(), 2u);
  EXPECT_EQ(names_in(scratch.path()), (std::set<std::string>{"step-00000000", "step-00000010", "step-00000040"}));
  EXPECT_TRUE(remove_after(scratch.path(), 10).empty());
}

TEST(Damage, IsSetAsideUnderANameThatIsFree) {
  const Scratch scratch;
  for (const char* name : {"step-00000010.damaged-1", "step-00000010.damaged-2"}) {
    write_step(scratch.path(), 10);
    EXPECT_EQ(set_aside(scratch / "step-00000010"), scratch / name);
  }
  EXPECT_EQ(names_in(scratch.path()), (std::set<std::string>{"step-00000010.damaged-1", "step-00000010.damaged-2"}));
  EXPECT_EQ(newest_checkpoint(scratch.path()), std::nullopt);
}

// Whatever else has the name of a step, or of a file in it.
TEST(Damage, MayBeALinkToNothingOrNoFile) {
  const Scratch scratch;
  fs::create_symlink("/gone", scratch / "step-00000010");
  EXPECT_EQ(newest_checkpoint(scratch.path()), std::nullopt);
  const fs::path step = write_step(scratch.path(), 10);
  EXPECT_EQ(newest_checkpoint(scratch.path()), step);
  EXPECT_TRUE(fs::is_symlink(scratch / "step-00000010.damaged-1"));
  const Manifest manifest = read_manifest(step);
  fs::remove(step / "note.txt");
  fs::create_directory(step / "note.txt");
  EXPECT_THAT(user_error([&] { check_complete(step, manifest); }), HasSubstr("note.txt: is not a regular file"));
}

}  // namespace
}  // namespace upcycle
