// A run without training, to be killed: crash_writer DIRECTORY STEPS ANNOUNCED MODE
// Loads the newest checkpoint of DIRECTORY on whatever number of ranks there is and holds every bit of it against what its step must have
// written, then writes STEPS more as MODE says, and keeps 2. ANNOUNCED gets "loaded N" (-1: none), "good", and "published N" after each commit.
// MODE: plain; asynchronous, as the Saver does it, from a copy and streamed in turn; divided, into several files; buffered; independent.
// Exit codes: 0, 2 (a UserError, told once), 3 (what was loaded is wrong).
#include <ATen/ops/empty.h>
#include <fcntl.h>
#include <unistd.h>

#include <cstring>
#include <functional>
#include <iostream>

#include "base/error.hpp"
#include "checkpoint/boxes.hpp"
#include "checkpoint/reader.hpp"
#include "checkpoint/writer.hpp"
#include "parallel/mesh.hpp"
#include "support/scratch.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;

struct Kept {
  const char* name;
  at::ScalarType dtype;
  Shape shape;
};
const std::vector<Kept>& tensors() {
  static const std::vector<Kept> all = {{"model.embed_tokens.weight", at::kBFloat16, {512, 250}},
                                        {"model.layers.0.mlp.experts.up_proj.weight", at::kBFloat16, {8, 63, 256}},
                                        {"model.layers.0.mlp.gate.weight", at::kFloat, {8, 256}},
                                        {"model.layers.1.mlp.down_proj.weight", at::kFloat, {60, 256}},
                                        {"model.norm.weight", at::kBFloat16, {250}}};
  return all;
}
constexpr const char* kFiles[] = {kWeightsFile, kFirstMomentsFile, kSecondMomentsFile};

/// SplitMix64's finaliser: bits that differ in every step, file, tensor and place.
uint64_t mixed(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

/// The whole of a tensor at a step: a function of step, file, name and index.
Tensor value_at(int64_t step, size_t file, size_t tensor) {
  const Kept& kept = tensors()[tensor];
  const Tensor out = at::empty(kept.shape, at::TensorOptions(file == 0 ? kept.dtype : at::kFloat));
  const uint64_t salt = mixed(static_cast<uint64_t>(step) * 1'000 + file * 100 + tensor + 1);
  auto* bytes = static_cast<std::byte*>(out.mutable_data_ptr());
  const size_t width = out.element_size();
  for (size_t i = 0; i < static_cast<size_t>(out.numel()); ++i) {
    const uint64_t bits = mixed(salt + i);
    std::memcpy(bytes + i * width, &bits, width);
  }
  return out;
}

/// Part `rank` of `ranks` along dim `dim`.
Box part_of(const Shape& shape, size_t dim, int rank, int ranks) {
  Box box = whole(shape);
  dim %= shape.size();
  box.begin[dim] = shape[dim] * rank / ranks;
  box.size[dim] = shape[dim] * (rank + 1) / ranks - box.begin[dim];
  return box;
}

std::string note_of(int64_t step) { return text("what step ", step, " says\n"); }

WriteOptions options_of(const std::string& mode, int64_t step, WriterThreads& threads) {
  WriteOptions options;
  if (mode == "asynchronous") {
    options.threads = &threads;
    options.take_later = step % 2 == 1;
  } else if (mode == "divided") {
    options.file_bytes = 300'000;
  } else if (mode == "buffered") {
    options.transfer = Transfer::buffered;
  } else if (mode == "independent") {
    options.transfer = Transfer::independent;
  } else if (mode != "plain") {
    fail("no such mode: ", mode);
  }
  return options;
}

/// `published` is called on rank 0 when it is; by its thread, perhaps later, where that writes.
void write_step(const fs::path& folder, int64_t step, const Communicator& world, const WriteOptions& options, const std::function<void()>& published) {
  CheckpointWriter writer(folder / step_directory(step), world, options);
  for (size_t file = 0; file < std::size(kFiles); ++file) {
    std::vector<Piece> pieces;
    for (size_t i = 0; i < tensors().size(); ++i) {
      const Box box = part_of(tensors()[i].shape, i, world.rank(), world.size());
      pieces.push_back({tensors()[i].name, tensors()[i].shape, box, view_of(value_at(step, file, i), box)});
    }
    writer.add(kFiles[file], pieces);
  }
  writer.add_text("config.json", note_of(step));
  writer.add_text("tokenizer/tokenizer.json", note_of(step));
  // Steps, while anybody writes.
  while (options.threads && world.all_reduce(int64_t{!options.threads->idle()}, Reduce::max) > 0) usleep(1000);
  writer.commit({.run_id = "crash", .step = step, .training = {{"step", step}}});
  if (options.threads && world.rank() == 0) options.threads->push(published);
  if (!options.threads) world.together([&] { if (world.rank() == 0) published(); });
}

/// What is wrong with a checkpoint; "" when it is, on this rank's boxes, what its step wrote. Other boxes than those it was written in.
std::string wrong_with(const CheckpointReader& reader, const Communicator& world) {
  const int64_t step = reader.manifest().step;
  if (reader.folder().filename() != step_directory(step) || reader.manifest().training != nlohmann::json{{"step", step}})
    return "the manifest is of another step";
  for (const char* file : {"config.json", "tokenizer/tokenizer.json"}) {
    if (contents(reader.folder() / file) != note_of(step)) return text(file, " is of another step");
  }
  for (size_t file = 0; file < std::size(kFiles); ++file) {
    if (reader.tensors(kFiles[file]).size() != tensors().size()) return text(kFiles[file], " has other tensors");
    for (size_t i = 0; i < tensors().size(); ++i) {
      const Tensor expected = value_at(step, file, i);
      const Box box = part_of(tensors()[i].shape, i + 1, world.rank(), world.size());
      Piece piece{tensors()[i].name, tensors()[i].shape, box, at::empty(box.size, expected.options())};
      reader.fill(kFiles[file], std::span(&piece, 1));
      const Tensor part = view_of(expected, box).contiguous();
      if (std::memcmp(part.const_data_ptr(), piece.local.const_data_ptr(), part.nbytes()) != 0)
        return text(kFiles[file], ": tensor '", tensors()[i].name, "' ", describe(box), " is not what step ", step, " wrote");
    }
  }
  return "";
}

/// In one write, so that it is there although the process is killed right after.
void announce(const char* file, const std::string& line) {
  const int out = ::open(file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (::write(out, (line + "\n").data(), line.size() + 1) < 0) std::perror(file);
  ::close(out);
}

int run(const fs::path& folder, int64_t steps, const char* announced, const std::string& mode) {
  const Communicator world = Communicator::everyone();
  const auto tell = [&](const std::string& line) { if (world.rank() == 0) announce(announced, line); };
  std::vector<std::string> refused;
  const auto newest = newest_checkpoint(folder, &refused);
  int64_t step = -1;
  std::string wrong;
  if (!refused.empty()) wrong = "a step that is no valid checkpoint: " + refused.front();
  if (newest && wrong.empty()) {
    const CheckpointReader reader(*newest);
    step = reader.manifest().step;
    tell(text("loaded ", step));
    wrong = wrong_with(reader, world);
  } else {
    tell("loaded -1");
  }
  if (!wrong.empty()) std::cerr << text("crash_writer: rank ", world.rank(), ": ", wrong, "\n") << std::flush;
  if (world.all_reduce(wrong.empty() ? 0 : 1, Reduce::max) != 0) return 3;
  tell("good");
  WriterThreads threads(uint64_t{1} << 20);
  for (const int64_t last = step + steps; step < last;) {
    ++step;
    write_step(folder, step, world, options_of(mode, step, threads), [=] {
      announce(announced, text("published ", step));
      remove_old(folder, 2, 0);
    });
    world.together([&] { threads.finish(); });
  }
  return 0;
}

}  // namespace
}  // namespace upcycle

int main(int argc, char** argv) {
  using namespace upcycle;
  const MpiSession session(&argc, &argv);
  try {
    return run(argv[1], std::atoll(argv[2]), argv[3], argv[4]);
  } catch (const UserError& error) {
    if (world_rank() == 0) std::cerr << "crash_writer: " << error.what() << std::endl;
    return 2;
  } catch (const std::exception& error) {
    std::cerr << text("crash_writer: rank ", world_rank(), ": ", error.what(), "\n") << std::flush;
    abort_all_ranks(1);
  }
}
