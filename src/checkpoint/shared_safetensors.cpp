#include "checkpoint/shared_safetensors.hpp"

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <fcntl.h>
#include <xxhash.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <set>

#include "base/error.hpp"
#include "checkpoint/block_file.hpp"
#include "checkpoint/block_notes.hpp"
#include "checkpoint/blocks.hpp"
#include "checkpoint/boxes.hpp"
#include "checkpoint/durable.hpp"
#include "checkpoint/first_rank.hpp"
#include "checkpoint/safetensors_layout.hpp"
#include "checkpoint/writer_threads.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;
constexpr uint64_t kPage = Blocks::kAlignment, kRoom = uint64_t{32} << 20;

/// Makes a shard's file with all its room and its header, or finds it.
void make_file(const fs::path& path, const SafetensorsShard& shard) {
  const FileDescriptor file(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644));
  if (!file) fail_with_errno("opening", path);
  reserve(file, shard.header.size() + shard.bytes, path);
  write_at(file, std::as_bytes(std::span(shard.header)), 0, path);
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
  BlockNotes notes = {};
  std::optional<BlockFile> file = {};  ///< the tasks', once there is one
  size_t open_shard = SIZE_MAX;
  WriterThreads threads{kRoom};         ///< ends before what it uses

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

  /// In a task. `bytes` lie in memory as they do in the file's pages: all but the first and last, which others share, go directly.
  void store(const Block& block, std::span<const std::byte> bytes) {
    const BlockFile& to = open(block);
    const uint64_t begin = offset(block), head = std::min<uint64_t>(bytes.size(), (kPage - begin % kPage) % kPage);
    to.write(bytes.first(head), begin);
    to.write(bytes.subspan(head), begin + head);
    notes.add(block.number, checksum(bytes.data(), bytes.size()));
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
    std::string found;
    std::error_code error;
    if (BlockNotes::are_of(directory, whose)) {
      found = BlockNotes::read(directory);
    } else {
      fs::remove_all(directory, error);
      if (!error) fs::create_directories(directory, error);
      if (error) fail(directory.string(), ": can't be made: ", error.message());
      BlockNotes::begin(directory, whose);
    }
    for (const SafetensorsShard& s : shards) make_file(path(s), s);
    return found;
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
  s.threads.set_room(kRoom, kBlockBytes + static_cast<int64_t>(kPage));   // a block lies in memory as it does in the file's pages
  s.shards = safetensors_shards(s.items, max_shard_bytes, metadata);
  for (size_t i = 0; i < s.shards.size(); ++i) {
    s.bytes += s.shards[i].bytes;
    s.shard_of.resize(s.shards[i].end, i);
  }
  std::string noted;
  on_first_rank(world, [&] { noted = s.prepare(s.identity(identity)); });
  const std::map<uint64_t, uint64_t> hash_of = BlockNotes::parse(world.broadcast(std::move(noted), 0));

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
    s.notes = BlockNotes(s.directory, world.rank());
  });
  s.found = static_cast<uint64_t>(world.all_reduce(static_cast<int64_t>(there), Reduce::sum));
}

// What was given is written, for whoever goes on.
SharedSafetensors::~SharedSafetensors() {
  try {
    state_->threads.finish();
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
  const std::span<std::byte> memory = s.threads.borrow(static_cast<int64_t>(shift + s.size(block)));
  const std::span<std::byte> bytes = memory.subspan(shift);
  at::from_blob(bytes.data(), block.box.size, at::TensorOptions(item(block).dtype)).copy_(values.detach());
  s.touched.insert(s.shard_of[block.item]);
  s.threads.push([&s, block, bytes, memory] {
    s.store(block, bytes);
    s.threads.give_back(memory);
  });
}

void SharedSafetensors::finish() {
  State& s = *state_;
  s.world.together([&] {
    s.threads.finish();
    if (!s.waits.empty()) throw std::logic_error(text(s.waits.size(), " of ", s.missing.size(), " blocks were not written"));
    for (const size_t shard : s.touched) make_durable(s.path(s.shards[shard]));
  });
  s.file.reset();
  s.notes = {};
  on_first_rank(s.world, [&] {
    for (const SafetensorsShard& shard : s.shards) make_durable(s.path(shard));   // headers; an interrupted attempt's bytes
    if (s.shards.size() > 1) write_text_durably(s.directory / kSafetensorsIndex, safetensors_index(s.items, s.shards));
    BlockNotes::remove(s.directory);
    make_durable(s.directory);
  });
}

}  // namespace upcycle
