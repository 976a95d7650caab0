#include "checkpoint/writer.hpp"

#include <cerrno>

#include "base/error.hpp"
#include "base/log.hpp"
#include "base/text_file.hpp"
#include "checkpoint/digest.hpp"
#include "checkpoint/durable.hpp"
#include "checkpoint/file_writer.hpp"
#include "checkpoint/first_rank.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;
constexpr const char* kContinues = "continues.txt";
constexpr uint64_t kRoom = uint64_t{64} << 20;   // of a writer's own threads

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

/// A partial folder. It goes when nobody publishes it, whatever fails or is dropped, on whatever thread; unless it is to be continued.
class Unpublished {
 public:
  Unpublished(fs::path partial, bool continued) : partial_(std::move(partial)), stays_(continued) {}
  Unpublished(const Unpublished&) = delete;
  Unpublished& operator=(const Unpublished&) = delete;
  ~Unpublished() {
    std::error_code ignored;
    if (!stays_) fs::remove_all(partial_, ignored);
  }
  void publish(const fs::path& folder) {
    rename_durably(partial_, folder);
    stays_ = true;
  }

 private:
  fs::path partial_;
  bool stays_;
};

}  // namespace

struct CheckpointWriter::State {
  fs::path folder;
  fs::path partial;
  const Communicator& world;
  WriteOptions options;
  std::unique_ptr<WriterThreads> own_threads = {};
  std::vector<std::shared_ptr<FileWriter>> added = {};   ///< shared with the threads' last task
  nlohmann::json files = nlohmann::json::object();
  nlohmann::json texts = nlohmann::json::object();
  bool continued = false;
  std::shared_ptr<Unpublished> unpublished = {};   ///< on rank 0; in the end the threads'

  WriterThreads& threads() { return own_threads ? *own_threads : *options.threads; }
  void refuse_second(const std::string& file) const {
    if (files.contains(file)) throw std::logic_error(text("the checkpoint has a file '", file, "' already"));
  }
};

CheckpointWriter::CheckpointWriter(fs::path folder, const Communicator& world, WriteOptions options)
    : state_(new State{.folder = folder, .partial = folder.string() + ".partial", .world = world, .options = std::move(options)}) {
  State& s = *state_;
  on_first_rank(world, [&] {
    if (fs::exists(fs::symlink_status(s.folder))) make_way(s.folder);   // a link to nothing would be in the way, too
    const fs::path words = s.partial / kContinues;
    s.continued = !s.options.continues.empty() && fs::exists(words) && text_of(words) == s.options.continues;
    s.unpublished = std::make_shared<Unpublished>(s.partial, !s.options.continues.empty());
    if (s.continued) return;
    std::error_code error;
    fs::remove_all(s.partial, error);  // of a writer that was killed
    make_directories(s.partial.parent_path());
    if (!fs::create_directory(s.partial, error) && error) {
      errno = error.value();
      fail_with_errno("creating", s.partial);
    }
    if (!s.options.continues.empty()) write_text_durably(words, s.options.continues);
  });
  s.continued = world.all_reduce(int64_t{s.continued}, Reduce::max) > 0;
  if (!s.options.threads) s.own_threads = std::make_unique<WriterThreads>(kRoom);
}

CheckpointWriter::~CheckpointWriter() {
  state_->own_threads.reset();   // nobody writes into what is removed
}

uint64_t CheckpointWriter::bytes() const noexcept {
  uint64_t bytes = 0;
  for (const auto& file : state_->added) bytes += file->bytes();
  return bytes;
}

Transfer CheckpointWriter::transfer() const noexcept { return state_->added.empty() ? state_->options.transfer : state_->added[0]->transfer(); }

void CheckpointWriter::add(std::span<const File> files) {
  State& s = *state_;
  const size_t before = s.added.size();
  for (const File& file : files) {
    s.refuse_second(file.name);
    s.added.push_back(std::make_shared<FileWriter>(s.partial / file.name, file.pieces, s.world, s.options, s.threads(), s.continued));
    for (const std::string& name : s.added.back()->files()) s.files[name] = nullptr;
  }
  const auto added = std::span(s.added).subspan(before);
  for (const auto& file : added) file->write_travelling();
  s.world.together([&] {
    for (const auto& file : added) file->write_own();
  });
  for (const auto& file : added) file->end();
  if (!s.options.threads) s.world.together([&] { s.threads().finish(); });
}

void CheckpointWriter::add_text(const std::string& file, const std::string& content) {
  State& s = *state_;
  s.refuse_second(file);
  on_first_rank(s.world, [&] { write_text_durably(s.partial / file, content); });
  s.files[file] = nullptr;
  s.texts[file] = digest_of(content);
}

void CheckpointWriter::commit(Manifest manifest) {
  State& s = *state_;
  s.world.together([&] { s.threads().finish(); });
  for (const auto& file : s.added) file->gather_checksums();
  if (s.world.rank() == 0) {
    manifest.schema_version = kSchemaVersion;
    s.threads().push([folder = s.folder, partial = s.partial, unpublished = std::move(s.unpublished), added = s.added, files = s.files, texts = s.texts,
                      manifest = std::move(manifest)]() mutable {
      manifest.tensors = nlohmann::json::object();
      for (const auto& file : added) {
        file->store_checksums();
        manifest.tensors[file->files().front()] = file->summary();
      }
      fs::remove(partial / kContinues);
      for (const auto& [file, size] : files.items()) size = fs::file_size(partial / file);
      manifest.files = files;
      manifest.texts = texts;
      write_text_durably(partial / kManifestFile, to_text(manifest));
      make_durable(partial);
      unpublished->publish(folder);
    });
  }
  if (!s.options.threads) s.world.together([&] { s.threads().finish(); });
}

}  // namespace upcycle
