#include "checkpoint/stored_file.hpp"

#include <fcntl.h>

#include <iomanip>

#include "base/error.hpp"

namespace upcycle {
namespace {

// " (layer 3)" for "model.layers.3.mlp.up_proj.weight".
std::string layer_of(const std::string& name) {
  constexpr std::string_view word = "layers.";
  const size_t at = name.find(word);
  if (at == std::string::npos) return "";
  const size_t begin = at + word.size();
  return " (layer " + name.substr(begin, name.find('.', begin) - begin) + ")";
}

std::string hex(uint64_t number) { return text(std::hex, std::setfill('0'), std::setw(16), number); }

}  // namespace

StoredFile::StoredFile(const std::filesystem::path& path) : path_(path) {
  const TensorFile file = TensorFile::open(path);
  size_t blocks = 0;
  for (const auto& [spec, offset] : file.list()) entries_.emplace(spec.name, Entry{spec, offset, 0});
  for (auto& [name, entry] : entries_) {
    entry.first_checksum = blocks;
    blocks += static_cast<size_t>(entry.spec.blocks().count());
  }
  checksums_ = file.checksums();
  if (!checksums_.empty() && checksums_.size() != blocks) {
    fail(path.string(), ": has ", checksums_.size(), " checksums for ", blocks, " blocks: tensors are missing or have other shapes than when it was written");
  }
  file_ = FileDescriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file_) fail_with_errno("opening", path);
}

std::string StoredFile::read(const Entry& entry, int64_t block, std::span<std::byte> memory, uint64_t& sum) const {
  const ElementRange run = entry.spec.blocks().run(block);
  const uint64_t begin = entry.offset + static_cast<uint64_t>(run.begin * entry.spec.width());
  const auto where = [&] {
    return text("tensor '", entry.spec.name, "'", layer_of(entry.spec.name), ", elements ", run.begin, " to ", run.end - 1, ", bytes ", begin, " to ",
                begin + memory.size() - 1, " of ", path_.string());
  };
  const size_t got = read_at(file_, memory, begin, path_);
  if (got < memory.size()) return text(where(), ": the file ends before them");
  sum = checksum(memory.data(), memory.size());
  if (!has_checksums() || sum == checksum_of(entry, block)) return "";
  return text(where(), ": are not what was written (their checksum is ", hex(sum), ", stored is ", hex(checksum_of(entry, block)), ")");
}

void StoredFile::expect(const Entry& entry, int64_t first_block, int64_t last_block) const noexcept {
  const Blocks blocks = entry.spec.blocks();
  if (first_block >= last_block || first_block >= blocks.count()) return;
  const int64_t begin = blocks.run(first_block).begin, end = blocks.run(std::min(last_block, blocks.count()) - 1).end;
  ::posix_fadvise(file_.get(), static_cast<off_t>(entry.offset) + begin * entry.spec.width(), (end - begin) * entry.spec.width(), POSIX_FADV_WILLNEED);
}

}  // namespace upcycle
