#include "checkpoint/file_writer.hpp"

#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <map>

#include "base/error.hpp"
#include "base/log.hpp"
#include "checkpoint/boxes.hpp"
#include "checkpoint/digest.hpp"
#include "checkpoint/durable.hpp"
#include "checkpoint/first_rank.hpp"
#include "checkpoint/manifest.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;
constexpr int64_t kRoundBytes = int64_t{16} << 20;   // that a rank sends or receives at a time

void write_hyperslabs(const TensorFile& file, const TensorSpec& spec, int64_t number, const std::byte* data) {
  const ElementRange run = spec.blocks().run(number);
  const StoredDataset dataset = file.dataset(spec.name);
  for (const Box& box : boxes_of_run(spec.shape, run.begin, run.end)) {
    dataset.write(box, data);
    data += elements(box) * spec.width();
  }
}

std::span<const TensorSpec> specs_of(const WritePlan& plan, size_t first, size_t last) {
  return std::span(plan.tensors).subspan(first, last - first);
}

}  // namespace

FileWriter::FileWriter(fs::path path, std::span<const Piece> pieces, const Communicator& world, const WriteOptions& options,
                       WriterThreads& threads, bool continued)
    : path_(std::move(path)), world_(world), options_(options), threads_(threads) {
  std::string mine;
  world.together([&] { mine = declare(pieces); });
  plan_ = plan_writes(world.all_gather(mine));
  source_.emplace(plan_, pieces, world.rank(), world.size());
  checksums_.resize(plan_.blocks.size());
  for (size_t index = 0; index < plan_.blocks.size(); ++index) {
    if (plan_.blocks[index].writer == world.rank()) bytes_ += static_cast<uint64_t>(size(index));
  }
  parts_ = split();
  for (Part& part : parts_) open(part, continued);
  if (parts_.size() == 1) return;
  on_first_rank(world, [&] {
    std::map<std::string, std::vector<TensorSpec>> index;
    for (const Part& part : parts_) {
      const auto specs = specs_of(plan_, part.first, part.last);
      index[part.path.filename().string()].assign(specs.begin(), specs.end());
    }
    TensorFile::create_index(path_, index);
  });
}

// Tensors in files of at most options.file_bytes, unless one tensor is larger.
std::vector<FileWriter::Part> FileWriter::split() const {
  std::vector<Part> parts;
  uint64_t in_last = 0;
  size_t block = 0;
  for (size_t i = 0; i < plan_.tensors.size() || parts.empty(); ++i) {
    const bool none = plan_.tensors.empty();
    const uint64_t bytes = none ? 0 : static_cast<uint64_t>(plan_.tensors[i].bytes());
    if (parts.empty() || in_last + bytes > options_.file_bytes) {
      parts.push_back({.path = path_, .first = i, .last = i, .first_block = block, .last_block = block});
      in_last = 0;
    }
    in_last += bytes;
    while (block < plan_.blocks.size() && plan_.blocks[block].tensor == i) ++block;
    parts.back().last = none ? 0 : i + 1;
    parts.back().last_block = block;
  }
  for (size_t i = 0; parts.size() > 1 && i < parts.size(); ++i) {
    parts[i].path = path_.parent_path() / part_name(path_.filename().string(), i + 1, parts.size());
  }
  return parts;
}

// **Collective.** Rank 0 makes the file with room for everything; all ranks open it.
void FileWriter::open(Part& part, bool continued) {
  std::string told;
  on_first_rank(world_, [&] {
    const auto specs = specs_of(plan_, part.first, part.last);
    part.was_there = continued && fs::exists(part.path);
    if (part.was_there) {
      part.extents = TensorFile::open(part.path).extents(specs);
    } else {
      // Under another name first: what has this name is whole but for the values.
      const fs::path unfinished = part.path.string() + ".new";
      part.extents = TensorFile::create(unfinished, {specs.begin(), specs.end()});
      rename_durably(unfinished, part.path);
    }
    told = nlohmann::json{part.extents.offsets, part.extents.checksums, part.was_there}.dump();
  });
  const auto known = nlohmann::json::parse(world_.broadcast(told, 0));
  part.extents = {known[0].get<std::vector<uint64_t>>(), known[1].get<uint64_t>()};
  part.was_there = known[2].get<bool>();
  const bool hyperslabs = options_.transfer == Transfer::independent;
  world_.together([&] {
    if (hyperslabs) {
      part.hyperslabs = TensorFile::open_for_writing(part.path);
    } else {
      part.file.emplace(part.path, options_.transfer);
    }
  });
  transfer_ = hyperslabs ? Transfer::independent : part.file->transfer();
}

const FileWriter::Part& FileWriter::part_of(size_t index) const {
  return *std::find_if(parts_.begin(), parts_.end(), [&](const Part& part) { return index < part.last_block; });
}

uint64_t FileWriter::place(const Part& part, size_t index) const {
  const WritePlan::Block& block = plan_.blocks[index];
  const TensorSpec& spec = plan_.tensors[block.tensor];
  const int64_t begin = spec.blocks().run(block.number).begin;
  return part.extents.offsets[block.tensor - part.first] + static_cast<uint64_t>(begin * spec.width());
}

void FileWriter::report(size_t index) {
  taken_ += static_cast<uint64_t>(size(index));
  if (options_.progress) options_.progress(taken_, bytes_);
}

void FileWriter::end() {
  if (std::any_of(parts_.begin(), parts_.end(), [](const Part& part) { return part.was_there; })) {
    const int64_t there = world_.all_reduce(static_cast<int64_t>(found_), Reduce::sum), all = world_.all_reduce(static_cast<int64_t>(bytes_), Reduce::sum);
    log::info(text("continuing ", path_.string(), ": ", there, " of ", all, " bytes were there"));
  }
  for (Part& part : parts_) {
    if (part.hyperslabs) world_.together([&] { part.hyperslabs->close(); });
    // On every rank: a rank's bytes may still be on its own host.
    threads_.push([self = shared_from_this(), &part] { make_durable(part.path); });
  }
}

void FileWriter::write_travelling() {
  for (const std::vector<size_t>& round : rounds(plan_, kRoundBytes)) {
    std::vector<Tensor> packed;
    world_.together([&] { packed = source_->pack(round); });
    const std::vector<Tensor> arrived = source_->exchange(world_, round, packed);
    world_.together([&] {
      std::vector<int64_t> taken(arrived.size());
      for (const size_t index : round) {
        const WritePlan::Block& block = plan_.blocks[index];
        if (block.writer != world_.rank()) continue;
        const std::span<std::byte> bytes = threads_.borrow(size(index));
        source_->fill(block, bytes.data());
        source_->unpack(block, arrived, taken, bytes.data());
        write_block(part_of(index), index, bytes);
        report(index);
      }
    });
  }
}

void FileWriter::write_own() {
  for (size_t index = 0; index < plan_.blocks.size(); ++index) {
    const WritePlan::Block& block = plan_.blocks[index];
    if (block.writer != world_.rank() || block.travels()) continue;
    const Part& part = part_of(index);
    if (is_there(part, index)) {
      found_ += static_cast<uint64_t>(size(index));
    } else if (options_.take_later && part.file) {
      take_later(part, index);
    } else {
      const std::span<std::byte> bytes = threads_.borrow(size(index));
      source_->fill(block, bytes.data());
      write_block(part, index, bytes);
    }
    report(index);
  }
}

// True where an interrupted writer has written this block, and the disk has it still.
bool FileWriter::is_there(const Part& part, size_t index) {
  if (!part.was_there || !part.file) return false;
  uint64_t stored = 0;
  part.file->read(std::as_writable_bytes(std::span(&stored, 1)), place_of_checksum(part, index));
  if (stored == 0) return false;
  const std::span<std::byte> bytes = threads_.borrow(size(index));
  const bool same = part.file->read(bytes, place(part, index)) == bytes.size() && checksum(bytes.data(), bytes.size()) == stored;
  if (same) checksums_[index] = stored;
  threads_.give_back(bytes);
  return same;
}

void FileWriter::write_block(const Part& part, size_t index, std::span<std::byte> bytes) {
  const WritePlan::Block& block = plan_.blocks[index];
  if (part.hyperslabs || options_.waits) checksums_[index] = checksum(bytes.data(), bytes.size());
  if (part.hyperslabs) {
    write_hyperslabs(*part.hyperslabs, plan_.tensors[block.tensor], block.number, bytes.data());
    return threads_.give_back(bytes);
  }
  threads_.push_beside([this, self = shared_from_this(), &part, index, bytes] {
    if (!options_.waits) checksums_[index] = checksum(bytes.data(), bytes.size());
    part.file->write(bytes, place(part, index));
    // What may be continued remembers which of its blocks are done.
    if (!options_.continues.empty()) part.file->write(std::as_bytes(std::span(&checksums_[index], 1)), place_of_checksum(part, index));
    threads_.give_back(bytes);
  });
}

void FileWriter::take_later(const Part& part, size_t index) {
  threads_.push_beside([this, self = shared_from_this(), &part, index] {
    const std::span<std::byte> bytes = threads_.scratch(size(index));
    source_->fill(plan_.blocks[index], bytes.data());
    checksums_[index] = checksum(bytes.data(), bytes.size());
    part.file->write(bytes, place(part, index));
  });
}

void FileWriter::gather_checksums() {
  // Each is one rank's; the others have 0.
  Tensor sums = at::from_blob(checksums_.data(), {static_cast<int64_t>(checksums_.size())}, at::TensorOptions(at::kLong));
  world_.all_reduce(sums);
}

void FileWriter::store_checksums() const {
  for (const Part& part : parts_) {
    const auto sums = std::span(checksums_).subspan(part.first_block, part.last_block - part.first_block);
    if (sums.empty()) continue;
    BlockFile(part.path, Transfer::buffered).write(std::as_bytes(sums), part.extents.checksums);
    make_durable(part.path);
  }
}

nlohmann::json FileWriter::summary() const {
  int64_t bytes = 0;
  for (const TensorSpec& spec : plan_.tensors) bytes += spec.bytes();
  nlohmann::json out = {{"count", plan_.tensors.size()}, {"bytes", bytes}, {"digest", digest_of(plan_.tensors, checksums_)}};
  for (size_t i = 0; parts_.size() > 1 && i < parts_.size(); ++i) out["parts"].push_back(parts_[i].path.filename().string());
  return out;
}

std::vector<std::string> FileWriter::files() const {
  std::vector<std::string> out{path_.filename().string()};
  for (size_t i = 0; parts_.size() > 1 && i < parts_.size(); ++i) out.push_back(parts_[i].path.filename().string());
  return out;
}

}  // namespace upcycle
