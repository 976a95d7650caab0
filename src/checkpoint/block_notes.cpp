#include "checkpoint/block_notes.hpp"

#include <fcntl.h>
#include <unistd.h>
#include <xxhash.h>

#include <cstring>
#include <vector>

#include "base/text_file.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;
constexpr const char* kNotes = ".resume.";         // + rank
constexpr const char* kIdentity = ".resume.json";

struct Note {
  uint64_t block, hash, check;
  static Note of(uint64_t block, uint64_t hash) { return {block, hash, check_of(block, hash)}; }
  bool whole() const { return check == check_of(block, hash); }
  static uint64_t check_of(uint64_t block, uint64_t hash) {
    const uint64_t both[] = {block, hash};
    return XXH3_64bits_withSeed(both, sizeof both, 0x75706379636c65);
  }
};

}  // namespace

bool BlockNotes::are_of(const fs::path& directory, const std::string& whose) {
  return fs::exists(directory / kIdentity) && text_of(directory / kIdentity) == whose;
}

void BlockNotes::begin(const fs::path& directory, const std::string& whose) { write_text_durably(directory / kIdentity, whose); }

std::string BlockNotes::read(const fs::path& directory) {
  std::string notes;
  for (const auto& entry : fs::directory_iterator(directory)) {
    const std::string name = entry.path().filename().string();
    if (!name.starts_with(kNotes) || name == kIdentity) continue;
    const std::string all = text_of(entry.path());
    notes += all.substr(0, all.size() / sizeof(Note) * sizeof(Note));
  }
  return notes;
}

std::map<uint64_t, uint64_t> BlockNotes::parse(const std::string& notes) {
  std::map<uint64_t, uint64_t> hash_of;
  for (size_t at = 0; at + sizeof(Note) <= notes.size(); at += sizeof(Note)) {
    Note note;
    std::memcpy(&note, notes.data() + at, sizeof note);
    if (note.whole()) hash_of[note.block] = note.hash;
  }
  return hash_of;
}

void BlockNotes::remove(const fs::path& directory) {
  std::vector<fs::path> found;
  for (const auto& entry : fs::directory_iterator(directory)) {
    if (entry.path().filename().string().starts_with(kNotes)) found.push_back(entry.path());
  }
  for (const fs::path& path : found) fs::remove(path);
}

BlockNotes::BlockNotes(const fs::path& directory, int rank) : path_(directory / (kNotes + std::to_string(rank))) {
  file_ = FileDescriptor(::open(path_.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644));
  if (!file_) fail_with_errno("opening", path_);
  // A cut note would shift all behind it.
  std::error_code none;
  if (::ftruncate(file_.get(), static_cast<off_t>(fs::file_size(path_, none) / sizeof(Note) * sizeof(Note))) != 0) fail_with_errno("resizing", path_);
}

void BlockNotes::add(uint64_t block, uint64_t hash) const {
  const Note note = Note::of(block, hash);
  if (::write(file_.get(), &note, sizeof note) != sizeof note) fail_with_errno("writing", path_);
}

}  // namespace upcycle
