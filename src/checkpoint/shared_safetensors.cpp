#include "checkpoint/shared_safetensors.hpp"

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <fcntl.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <set>

#include "base/error.hpp"
#include "base/text_file.hpp"
#include "checkpoint/block_file.hpp"
#include "checkpoint/blocks.hpp"
#include "checkpoint/boxes.hpp"
#include "checkpoint/durable.hpp"
#include "checkpoint/safetensors_layout.hpp"
#include "checkpoint/writer_thread.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;
constexpr uint64_t kPage = Blocks::kAlignment, kRoom = uint64_t{32} << 20;
constexpr const char* kNotes = ".resume.";         // + rank
constexpr const char* kIdentity = ".resume.json";  // whose notes they are

/// One block that was written. A note that was cut off in the middle, or lies in a file that a power cut left full of zeros, is none.
struct Note {
  uint64_t block, hash, check;
  static Note of(uint64_t block, uint64_t hash) { return {block, hash, check_of(block, hash)}; }
  bool whole() const { return check == check_of(block, hash); }
  static uint64_t check_of(uint64_t block, uint64_t hash) {
    const uint64_t both[] = {block, hash};
    return XXH3_64bits_withSeed(both, sizeof both, 0x75706379636c65);
  }
};

FileDescriptor open_file(const fs::path& path, int flags) {
  FileDescriptor file(::open(path.c_str(), flags | O_CLOEXEC, 0644));
  if (!file) fail_with_errno("opening", path);
  return file;
}

void set_size(const FileDescriptor& file, uint64_t bytes, const fs::path& path) {
  if (::ftruncate(file.get(), static_cast<off_t>(bytes)) != 0) fail_with_errno("resizing", path);
}

}  // namespace

struct SharedSafetensors::State {
  fs::path directory;
  std::vector<SafetensorsItem> items;
  const Communicator& world;
  std::vector<SafetensorsShard> shards = {};
  std::vector<size_t> shard_of = {};   ///< of each item
  std::vector<Block> missing = {};
  std::set<size_t> waits = {};         ///< numbers of what is missing still
  uint64_t bytes = 0, found = 0;
  std::set<size_t> touched = {};       ///< shards
  FileDescriptor notes = {};
  std::optional<BlockFile> file = {};  ///< the thread's, once it has something to do
  size_t open_shard = SIZE_MAX;
  WriterThread thread{kRoom};          ///< ends before what it uses

  /// **Collective.**
  template <class Action>
  void on_first_rank(Action&& action) {
    world.together([&] {
      if (world.rank() == 0) action();
    });
  }

  uint64_t width(const Block& block) const { return c10::elementSize(items[block.item].dtype); }
  uint64_t size(const Block& block) const { return static_cast<uint64_t>(elements(block.box)) * width(block); }
  const SafetensorsShard& shard(const Block& block) const { return shards[shard_of[block.item]]; }
  fs::path path(const SafetensorsShard& s) const { return directory / s.name; }
  uint64_t offset(const Block& block) const {
    const int64_t first = span_of(block.box, items[block.item].shape).begin;
    return shard(block).offsets[block.item - shard(block).begin] + static_cast<uint64_t>(first) * width(block);
  }

  const BlockFile& open(const Block& block) {
    if (const size_t wanted = shard_of[block.item]; wanted != open_shard) {
      file.emplace(path(shards[wanted]), Transfer::automatic);
      open_shard = wanted;
    }
    return *file;
  }

  /// On the thread. `bytes` lie in memory as they do in the file's pages: all but the first and last, which others share, go directly.
  void store(const Block& block, std::span<const std::byte> bytes) {
    const BlockFile& to = open(block);
    const uint64_t begin = offset(block), head = std::min<uint64_t>(bytes.size(), (kPage - begin % kPage) % kPage);
    to.write(bytes.first(head), begin);
    to.write(bytes.subspan(head), begin + head);
    const Note note = Note::of(block.number, checksum(bytes.data(), bytes.size()));
    if (::write(notes.get(), &note, sizeof note) != sizeof note) fail_with_errno("writing", directory / kNotes);
  }

  /// Of all ranks, in the order of the files.
  std::vector<Block> all_blocks() const {
    std::vector<Block> out;
    for (const SafetensorsShard& s : shards) {
      std::vector<size_t> order(s.end - s.begin);
      std::iota(order.begin(), order.end(), s.begin);
      std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return s.offsets[a - s.begin] < s.offsets[b - s.begin]; });
      for (const size_t item : order) {
        const auto most = block_bytes / static_cast<int64_t>(c10::elementSize(items[item].dtype));
        for (const Box& box : row_blocks(items[item].shape, most)) out.push_back({item, box, out.size()});
      }
    }
    return out;
  }

  /// Says whose bytes these are: everything that decides what is where.
  std::string identity(const std::string& callers) const {
    XXH64_hash_t headers = 0;
    for (const SafetensorsShard& s : shards) headers = XXH3_64bits_withSeed(s.header.data(), s.header.size(), headers);
    return nlohmann::json{{"of", callers}, {"headers", headers}, {"bytes", bytes}, {"block", block_bytes}}.dump(2) + "\n";
  }

  /// By rank 0. The notes of an attempt that can be gone on from; makes the directory for a new one.
  std::string prepare(const std::string& whose) {
    std::string notes;
    std::error_code error;
    if (fs::exists(directory / kIdentity) && text_of(directory / kIdentity) == whose) {
      for (const auto& entry : fs::directory_iterator(directory)) {
        const std::string name = entry.path().filename().string();
        if (!name.starts_with(kNotes) || name == kIdentity) continue;
        const std::string all = text_of(entry.path());
        notes += all.substr(0, all.size() / sizeof(Note) * sizeof(Note));
      }
    } else {
      fs::remove_all(directory, error);
      if (!error) fs::create_directories(directory, error);
      if (error) fail(directory.string(), ": can't be made: ", error.message());
      write_text_durably(directory / kIdentity, whose);
    }
    for (const SafetensorsShard& s : shards) {
      const FileDescriptor made = open_file(path(s), O_RDWR | O_CREAT);
      set_size(made, s.header.size() + s.bytes, path(s));
      // So that a full disk shows now. Not every file system can, and it is a full one's turn to say so.
      if (::fallocate(made.get(), 0, 0, static_cast<off_t>(s.header.size() + s.bytes)) != 0 && (errno == ENOSPC || errno == EDQUOT)) {
        fail_with_errno("writing", path(s));
      }
      write_at(made, std::as_bytes(std::span(s.header)), 0, path(s));
    }
    return notes;
  }

  /// Whether the block's bytes are those of the note.
  bool is_there(const Block& block, uint64_t hash, std::vector<std::byte>& buffer) {
    buffer.resize(size(block));
    return open(block).read(buffer, offset(block)) == buffer.size() &&
           checksum(buffer.data(), buffer.size()) == hash;
  }
};

SharedSafetensors::SharedSafetensors(fs::path directory, std::vector<SafetensorsItem> items, uint64_t max_shard_bytes,
                                     const std::map<std::string, std::string>& metadata, const Communicator& world,
                                     const std::string& identity, const Progress& progress)
    : state_(new State{.directory = std::move(directory), .items = std::move(items), .world = world}) {
  State& s = *state_;
  s.shards = safetensors_shards(s.items, max_shard_bytes, metadata);
  for (size_t i = 0; i < s.shards.size(); ++i) {
    s.bytes += s.shards[i].bytes;
    s.shard_of.resize(s.shards[i].end, i);
  }
  std::string noted;
  s.on_first_rank([&] { noted = s.prepare(s.identity(identity)); });
  noted = world.broadcast(std::move(noted), 0);
  std::map<uint64_t, uint64_t> hash_of;
  for (size_t at = 0; at + sizeof(Note) <= noted.size(); at += sizeof(Note)) {
    Note note;
    std::memcpy(&note, noted.data() + at, sizeof note);
    if (note.whole()) hash_of[note.block] = note.hash;
  }

  uint64_t before = 0, mine = 0, total = 0, there = 0;
  const auto own = [&](uint64_t begin) {   // neighbours, about as many bytes for each rank
    return static_cast<int>(static_cast<unsigned __int128>(begin) * static_cast<unsigned>(world.size()) / std::max<uint64_t>(1, s.bytes)) == world.rank();
  };
  std::vector<Block> noted_blocks;
  for (Block& block : s.all_blocks()) {
    if (own(before)) {
      total += s.size(block);
      (hash_of.contains(block.number) ? noted_blocks : s.missing).push_back(block);
    }
    before += s.size(block);
  }
  world.together([&] {
    std::vector<std::byte> buffer;
    for (const Block& block : noted_blocks) {
      const bool fine = s.is_there(block, hash_of.at(block.number), buffer);
      if (fine) there += s.size(block);
      if (!fine) s.missing.push_back(block);
      if (progress) progress(mine += s.size(block), total);
    }
    std::sort(s.missing.begin(), s.missing.end(), [](const Block& a, const Block& b) { return a.number < b.number; });
    for (const Block& block : s.missing) s.waits.insert(block.number);
    for (const Block& block : noted_blocks) s.touched.insert(s.shard_of[block.item]);   // written, but maybe not on the disk yet
    const fs::path path = s.directory / (kNotes + std::to_string(world.rank()));
    s.notes = open_file(path, O_WRONLY | O_CREAT | O_APPEND);
    std::error_code none;
    set_size(s.notes, fs::file_size(path, none) / sizeof(Note) * sizeof(Note), path);   // a cut note would shift all behind it
  });
  s.found = static_cast<uint64_t>(world.all_reduce(static_cast<int64_t>(there), Reduce::sum));
}

// What was given is written, for whoever goes on.
SharedSafetensors::~SharedSafetensors() {
  try {
    state_->thread.finish();
  } catch (...) {   // was told, or whoever ends here has something worse to tell
  }
}

uint64_t SharedSafetensors::bytes() const noexcept { return state_->bytes; }
uint64_t SharedSafetensors::found() const noexcept { return state_->found; }
const std::vector<SharedSafetensors::Block>& SharedSafetensors::missing() const noexcept { return state_->missing; }
const SafetensorsItem& SharedSafetensors::item(const Block& block) const { return state_->items[block.item]; }

void SharedSafetensors::write(const Block& block, const Tensor& values) {
  State& s = *state_;
  if (s.waits.erase(block.number) == 0) throw std::logic_error(text("block ", block.number, " is not missing"));
  if (values.sizes() != at::IntArrayRef(block.box.size)) {
    throw std::logic_error(text("tensor '", item(block).name, "': values ", describe(values.sizes().vec()), " for ", describe(block.box)));
  }
  const uint64_t shift = s.offset(block) % kPage;
  const Tensor memory = s.thread.borrow(kBlockBytes + static_cast<int64_t>(kPage));
  const std::span<std::byte> bytes = WriterThread::bytes_of(memory, kBlockBytes + static_cast<int64_t>(kPage)).subspan(shift, s.size(block));
  at::from_blob(bytes.data(), block.box.size, at::TensorOptions(item(block).dtype)).copy_(values.detach());
  s.touched.insert(s.shard_of[block.item]);
  s.thread.push([&s, block, bytes, memory] {
    s.store(block, bytes);
    s.thread.give_back(memory);
  });
}

void SharedSafetensors::finish() {
  State& s = *state_;
  s.world.together([&] {
    s.thread.finish();
    if (!s.waits.empty()) throw std::logic_error(text(s.waits.size(), " of ", s.missing.size(), " blocks were not written"));
    for (const size_t shard : s.touched) make_durable(s.path(s.shards[shard]));
  });
  s.file.reset();
  s.notes.reset();
  s.on_first_rank([&] {
    for (const SafetensorsShard& shard : s.shards) make_durable(s.path(shard));   // headers; an interrupted attempt's bytes
    if (s.shards.size() > 1) write_text_durably(s.directory / kSafetensorsIndex, safetensors_index(s.items, s.shards));
    std::vector<fs::path> notes;
    for (const auto& entry : fs::directory_iterator(s.directory)) {
      if (entry.path().filename().string().starts_with(kNotes)) notes.push_back(entry.path());
    }
    for (const fs::path& path : notes) fs::remove(path);
    make_durable(s.directory);
  });
}

}  // namespace upcycle
