// Saving behind the steps: what is published is the state at save(), whatever happens to the weights afterwards.
#include "train/saver.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <thread>

#include "checkpoint/digest.hpp"
#include "support/known_state.hpp"
#include "support/save_checkpoint.hpp"
#include "support/scratch.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;
using testing::ContainsRegex;
using testing::HasSubstr;
constexpr uint64_t kMuch = uint64_t{1} << 40;

Architecture small() {
  Architecture a;
  a.hidden = 64, a.layers = 2, a.heads = 4, a.kv_heads = 2, a.head_dim = 16, a.ffn = 128, a.vocab = 500, a.tied = true;
  a.experts = 8, a.top_k = 2, a.expert_ffn = 96;
  return a;
}

class Saving : public testing::Test {
 protected:
  void SetUp() override {
    begin();
    std::optional<Scratch>& own = scratch_;
    if (world().rank() == 0) own.emplace();
    folder_ = world().broadcast(own ? own->path().string() : "", 0);
    reference_ = digest_of_tensors(read_manifest(save_checkpoint(folder_ / "reference", state_->mesh, state_->stage.weights(), &*state_->optimizer, {3, 12, 0}, record_)).tensors);
  }
  void TearDown() override { world().barrier(); }

  void begin() {
    ParallelSection parallel;
    parallel.tensor = world_size() >= 4 ? 2 : 1;   // column cuts, so that blocks travel
    state_.emplace(small(), parallel, at::kBFloat16);
    state_->fill();
  }

  const Communicator& world() { return state_->mesh.world(); }

  /// As an update does.
  void spoil() {
    for (Bucket& bucket : state_->stage.weights().buckets()) bucket.values.fill_(9.0), bucket.masters.fill_(9.0);
    for (size_t i = 0; i < state_->stage.weights().buckets().size(); ++i) state_->optimizer->exp_avg(i).fill_(9.0), state_->optimizer->exp_avg_sq(i).fill_(9.0);
  }

  /// Steps until what is in flight is published: each tells, as the trainer's all-reduce does, what any rank has to say.
  int steps_until_idle(Saver& saver) {
    for (int steps = 0; steps < 10000; ++steps) {
      const bool writes = world().all_reduce(int64_t{saver.writes()}, Reduce::max) > 0, failed = world().all_reduce(int64_t{saver.failed()}, Reduce::max) > 0;
      if (!writes && !failed && steps > 0) return steps;
      saver.step(writes, failed);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    return -1;
  }

  RunRecord record_ = known_record(small());
  std::optional<KnownState> state_;
  std::optional<Scratch> scratch_;
  fs::path folder_;
  std::string reference_;
};

TEST_F(Saving, BehindTheStepsIsTheStateOfThatStep) {
  CheckpointSection settings;
  settings.asynchronous = true;
  for (const uint64_t room : {kMuch, uint64_t{0}}) {   // from a copy; streamed
    SCOPED_TRACE(room);
    begin();
    const fs::path checkpoints = folder_ / text("room-", room);
    testing::internal::CaptureStderr();
    Saver saver(checkpoints, state_->mesh, settings, [] {}, [=] { return room; });
    saver.save(state_->stage.weights(), &*state_->optimizer, {3, 12, 0}, record_, true);
    saver.before_update();
    spoil();
    EXPECT_GT(steps_until_idle(saver), 0);
    saver.finish();
    const std::string said = testing::internal::GetCapturedStderr();
    if (world().rank() == 0) {   // who speaks for all
      EXPECT_THAT(said, ContainsRegex(room > 0 ? "checkpoints are written (direct|buffered), behind the steps, from a copy of about [0-9.]+ GB "
                                                 "\\([0-9.]+ GB of host memory are free for it\\)\n"
                                               : "checkpoints are written (direct|buffered), behind the steps, streamed: a copy of about [0-9.]+ GB does not "
                                                 "fit into the 0.00 GB of host memory that are free for it, so the next update of the weights waits\n"));
    }
    world().barrier();
    EXPECT_EQ(digest_of_tensors(read_manifest(checkpoints / "step-00000003").tensors), reference_);
    KnownState other(small(), {}, at::kBFloat16);
    other.restore(CheckpointReader(checkpoints / "step-00000003"));
    other.expect_known();
  }
}

TEST_F(Saving, AnUpdateDoesNotWaitForWhatWasCopied) {
  CheckpointSection settings;
  settings.asynchronous = true;
  int waited = 0;   // alive() is called while there is something to wait for
  Saver saver(folder_ / "run", state_->mesh, settings, [&] { ++waited; }, [] { return kMuch; });
  saver.save(state_->stage.weights(), &*state_->optimizer, {3, 12, 0}, record_, true);
  waited = 0;
  saver.before_update();
  EXPECT_EQ(waited, 0) << "its files are not on the disk yet";
  saver.finish();
}

TEST_F(Saving, MemoryForCopiesIsTakenAheadWhereThereIsRoom) {
  CheckpointSection settings;
  settings.asynchronous = true;
  for (const uint64_t room : {kMuch, uint64_t{0}}) {
    SCOPED_TRACE(room);
    begin();
    const fs::path checkpoints = folder_ / text("ahead-", room);
    Saver saver(checkpoints, state_->mesh, settings, [] {}, [=] { return room; });
    EXPECT_EQ(saver.memory(), 0u) << "not before the first step";
    saver.take_memory(state_->stage.weights(), *state_->optimizer);
    const uint64_t taken = saver.memory();
    EXPECT_EQ(taken > 0, room > 0);
    saver.save(state_->stage.weights(), &*state_->optimizer, {3, 12, 0}, record_, true);   // at once: it waits
    saver.before_update();
    spoil();
    saver.finish();
    world().barrier();
    EXPECT_EQ(digest_of_tensors(read_manifest(checkpoints / "step-00000003").tensors), reference_);
  }
  settings.every = 0;   // nothing is known to be saved
  Saver saver(folder_ / "never", state_->mesh, settings, [] {}, [] { return kMuch; });
  saver.take_memory(state_->stage.weights(), *state_->optimizer);
  EXPECT_EQ(saver.memory(), 0u);
}

// It is not free any more, but it is there for the copy.
TEST_F(Saving, MemoryThatWasTakenCountsAsRoom) {
  CheckpointSection settings;
  settings.asynchronous = true;
  uint64_t room = kMuch;
  Saver saver(folder_ / "run", state_->mesh, settings, [] {}, [&] { return room; });
  saver.take_memory(state_->stage.weights(), *state_->optimizer);
  room = 0;
  testing::internal::CaptureStderr();
  saver.save(state_->stage.weights(), &*state_->optimizer, {3, 12, 0}, record_, true);
  spoil();   // at once: a copy has been made
  saver.finish();
  EXPECT_THAT(testing::internal::GetCapturedStderr(), testing::Not(HasSubstr("streamed")));
  world().barrier();
  EXPECT_EQ(digest_of_tensors(read_manifest(folder_ / "run/step-00000003").tensors), reference_);
}

TEST_F(Saving, ASecondSaveNeverOvertakesTheFirst) {
  CheckpointSection settings;
  settings.asynchronous = true;
  settings.keep = 2;
  Saver saver(folder_ / "run", state_->mesh, settings, [] {}, [] { return kMuch; });
  for (int64_t step = 1; step <= 4; ++step) {
    saver.save(state_->stage.weights(), &*state_->optimizer, {step, 4 * step, 0}, record_, true);
    if (step > 1) EXPECT_TRUE(fs::exists(folder_ / "run" / step_directory(step - 1) / kManifestFile)) << step;
    world().barrier();
  }
  saver.finish();
  world().barrier();
  EXPECT_EQ(valid_checkpoints(folder_ / "run", 100).size(), 2u);
  EXPECT_EQ(newest_checkpoint(folder_ / "run"), folder_ / "run/step-00000004");
}

TEST_F(Saving, EveryTransferWritesTheSameBytes) {
  for (const char* transfer : {"buffered", "independent"}) {
    CheckpointSection settings;
    settings.transfer = transfer;
    settings.file_size = std::string(transfer) == "buffered" ? 64 : 200e-6;   // several files
    Saver saver(folder_ / transfer, state_->mesh, settings, [] {}, [] { return kMuch; });
    saver.save(state_->stage.weights(), &*state_->optimizer, {3, 12, 0}, record_, true);
    world().barrier();
    const Manifest manifest = read_manifest(folder_ / transfer / "step-00000003");
    EXPECT_EQ(digest_of_tensors(manifest.tensors), reference_) << transfer;
    EXPECT_EQ(manifest.tensors[kWeightsFile].contains("parts"), settings.file_size < 1);
    KnownState other(small(), {}, at::kBFloat16);
    other.restore(CheckpointReader(folder_ / transfer / "step-00000003"));
    other.expect_known();
  }
}

TEST_F(Saving, AFailureBehindTheStepsIsEverybodysErrorAtTheNext) {
  CheckpointSection settings;
  settings.asynchronous = true;
  Saver saver(folder_ / "run", state_->mesh, settings, [] {}, [] { return kMuch; });
  saver.save(state_->stage.weights(), &*state_->optimizer, {1, 4, 0}, record_, true);
  saver.finish();
  saver.save(state_->stage.weights(), &*state_->optimizer, {2, 8, 0}, record_, true);
  world().barrier();
  world().together([&] {   // the directory is gone: what is to be made durable is not there
    if (world().rank() == 0) fs::remove_all(folder_ / "run/step-00000002.partial");
  });
  std::string said;
  try {
    for (int step = 0; step < 1000 && said.empty(); ++step) {
      saver.step(world().all_reduce(int64_t{saver.writes()}, Reduce::max) > 0, world().all_reduce(int64_t{saver.failed()}, Reduce::max) > 0);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    saver.finish();
  } catch (const UserError& error) {
    said = error.what();
  }
  EXPECT_THAT(said, HasSubstr("step-00000002.partial"));
  world().barrier();
  EXPECT_FALSE(fs::exists(folder_ / "run/step-00000002"));
  EXPECT_EQ(newest_checkpoint(folder_ / "run"), folder_ / "run/step-00000001");
}

}  // namespace
}  // namespace upcycle
