#include "checkpoint/writer.hpp"

#include "base/error.hpp"
#include "base/log.hpp"
#include "checkpoint/coverage.hpp"
#include "checkpoint/durable.hpp"
#include "checkpoint/slabs.hpp"
#include "checkpoint/tensor_file.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;

/// In bounded pieces: what is strided or on a GPU goes through one small host buffer.
void write_piece(const TensorFile& file, const Piece& piece) {
  const StoredDataset dataset = file.dataset(piece.name);
  const Tensor local = piece.local.detach();
  for (const Box& slab : slabs(piece.box.size, kSlabBytes / local.element_size())) {
    const Tensor host = view_of(local, slab).to(at::kCPU).contiguous();
    dataset.write(shifted(slab, piece.box.begin), host.const_data_ptr());
  }
}

/// A damaged step that a run resumed behind is in the way of the new one, but not ours to delete.
void make_way(const fs::path& folder) {
  std::string why;
  try {
    check_complete(folder, read_manifest(folder));
  } catch (const UserError& error) {
    why = error.what();
  }
  if (why.empty()) fail(folder.string(), ": this checkpoint exists; move it away, or resume from it");
  log::warning(text("a damaged checkpoint is in the way (", why, "): it is now ", set_aside(folder).string()));
}

}  // namespace

struct CheckpointWriter::State {
  fs::path folder;
  fs::path partial;
  const Communicator& world;
  nlohmann::json files = nlohmann::json::object();
  nlohmann::json tensors = nlohmann::json::object();
  bool committed = false;

  /// **Collective.** `action` on rank 0 alone; its error is everybody's.
  template <class Action>
  void on_first_rank(Action&& action) {
    world.together([&] {
      if (world.rank() == 0) action();
    });
  }
};

CheckpointWriter::CheckpointWriter(fs::path folder, const Communicator& world)
    : state_(new State{.folder = folder, .partial = folder.string() + ".partial", .world = world}) {
  State& s = *state_;
  s.on_first_rank([&] {
    if (fs::exists(s.folder)) make_way(s.folder);
    std::error_code error;
    fs::remove_all(s.partial, error);  // of a writer that was killed
    fs::create_directories(s.partial, error);
    if (error) fail("creating ", s.partial.string(), ": ", error.message());
  });
}

CheckpointWriter::~CheckpointWriter() {
  if (state_->committed || state_->world.rank() != 0) return;
  std::error_code ignored;
  fs::remove_all(state_->partial, ignored);
}

void CheckpointWriter::add(const std::string& file, std::span<const Piece> pieces) {
  State& s = *state_;
  if (s.files.contains(file)) throw std::logic_error(text("the checkpoint has a file '", file, "' already"));
  const fs::path path = s.partial / file;
  std::string mine;
  s.world.together([&] { mine = declare(pieces); });
  const std::vector<TensorSpec> specs = check_coverage(s.world.all_gather(mine));

  s.on_first_rank([&] { TensorFile::create(path, specs); });
  std::optional<TensorFile> out;
  s.world.together([&] { out = TensorFile::open_for_writing(path, s.world); });
  s.world.together([&] {
    for (const Piece& piece : pieces) write_piece(*out, piece);
  });
  s.world.together([&] { out->close(); });
  // On every rank: a rank's bytes may still be on its own host.
  s.world.together([&] { make_durable(path); });

  int64_t bytes = 0;
  for (const TensorSpec& spec : specs)
    bytes += elements(spec.shape) * static_cast<int64_t>(c10::elementSize(spec.dtype));
  s.tensors[file] = {{"count", specs.size()}, {"bytes", bytes}};
  s.files[file] = nullptr;
}

void CheckpointWriter::add_text(const std::string& file, const std::string& content) {
  State& s = *state_;
  if (s.files.contains(file)) throw std::logic_error(text("the checkpoint has a file '", file, "' already"));
  s.on_first_rank([&] { write_text_durably(s.partial / file, content); });
  s.files[file] = nullptr;
}

void CheckpointWriter::commit(Manifest manifest) {
  State& s = *state_;
  s.on_first_rank([&] {
    for (const auto& [file, size] : s.files.items()) s.files[file] = fs::file_size(s.partial / file);
    manifest.schema_version = kSchemaVersion;
    manifest.files = s.files;
    manifest.tensors = s.tensors;
    write_text_durably(s.partial / kManifestFile, to_json(manifest).dump(2) + "\n");
    make_durable(s.partial);
    rename_durably(s.partial, s.folder);
  });
  s.committed = true;
}

}  // namespace upcycle
