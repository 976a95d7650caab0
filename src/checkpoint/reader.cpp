#include "checkpoint/reader.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <algorithm>
#include <set>

#include "base/error.hpp"
#include "checkpoint/block_reads.hpp"
#include "checkpoint/boxes.hpp"
#include "checkpoint/stored_file.hpp"

namespace upcycle {
namespace {

constexpr int64_t kAhead = 4;   // blocks of a stream that the system is asked for before they are needed

bool is_floating(at::ScalarType dtype) { return c10::isFloatingType(dtype); }

std::span<std::byte> bytes_of(const Tensor& x) { return {static_cast<std::byte*>(x.mutable_data_ptr()), x.nbytes()}; }

// A block that holds some of a piece.
struct Needed {
  const StoredFile::Entry& entry;
  const Piece& piece;
  std::vector<Box> rows = {};   ///< the block's; none: read straight into the piece, which is plain memory of the stored dtype
};

void need(const StoredFile& file, const StoredFile::Entry& entry, const Piece& piece, std::vector<Needed>& needed, std::vector<BlockReads::Read>& reads) {
  const Blocks blocks = entry.spec.blocks();
  const ElementRange span = span_of(piece.box, entry.spec.shape);
  const int64_t last = blocks.of(span.end - 1);
  for (int64_t block = blocks.of(span.begin); block <= last; ++block) {
    Needed one{entry, piece};
    const ElementRange run = blocks.run(block);
    std::vector<Box> rows = boxes_of_run(entry.spec.shape, run.begin, run.end);
    BlockReads::Read read{&file, &entry, block, {}};
    if (rows.size() == 1 && intersection(rows[0], piece.box) == rows[0]) {
      const Tensor target = view_of(piece.local.detach(), relative_to(rows[0], piece.box));
      if (target.is_cpu() && target.is_contiguous() && target.scalar_type() == entry.spec.dtype) read.target = bytes_of(target);
    } else if (std::none_of(rows.begin(), rows.end(), [&](const Box& row) { return intersection(row, piece.box).has_value(); })) {
      continue;
    }
    if (read.target.empty()) one.rows = std::move(rows);
    needed.push_back(std::move(one));
    reads.push_back(read);
  }
}

// Copies what a block has of its piece.
void take(const Needed& needed, std::span<const std::byte> bytes) {
  const TensorSpec& spec = needed.entry.spec;
  const Tensor block = at::from_blob(const_cast<std::byte*>(bytes.data()), {static_cast<int64_t>(bytes.size()) / spec.width()}, at::TensorOptions(spec.dtype));
  int64_t at = 0;
  for (const Box& row : needed.rows) {
    if (const auto part = intersection(row, needed.piece.box)) {
      const Tensor stored = view_of(block.narrow(0, at, elements(row)).view(row.size), relative_to(*part, row));
      view_of(needed.piece.local.detach(), relative_to(*part, needed.piece.box)).copy_(stored);
    }
    at += elements(row);
  }
}

}  // namespace

struct CheckpointReader::State {
  std::filesystem::path folder;
  Manifest manifest;
  std::map<std::string, std::vector<StoredFile>> files;   ///< by kind of tensor; several where it is divided
  std::map<std::string, std::map<std::string, StoredTensor>> listed;

  struct Found {
    const StoredFile& file;
    const StoredFile::Entry& entry;
  };
  Found find(const std::string& kind, const std::string& name) const {
    const auto of_kind = files.find(kind);
    if (of_kind == files.end()) fail(folder.string(), ": this checkpoint has no ", kind);
    for (const StoredFile& file : of_kind->second) {
      if (const auto found = file.entries().find(name); found != file.entries().end()) return {file, found->second};
    }
    fail((folder / kind).string(), ": tensor '", name, "' is not there");
  }
};

CheckpointReader::CheckpointReader(const std::filesystem::path& folder) : state_(std::make_unique<State>()) {
  State& s = *state_;
  s.folder = folder;
  s.manifest = read_manifest(folder);
  check_complete(folder, s.manifest);
  std::set<std::string> divided;   // files that hold a part, and the indices through which parts are seen
  for (const auto& [kind, summary] : s.manifest.tensors.items()) {
    if (!summary.is_object() || !summary.contains("parts")) continue;
    divided.insert(kind);
    for (const auto& part : summary["parts"]) {
      divided.insert(part.get<std::string>());
      s.files[kind].emplace_back(folder / part.get<std::string>());
    }
  }
  for (const auto& [file, size] : s.manifest.files.items()) {
    if (std::filesystem::path(file).extension() == ".h5" && !divided.contains(file)) s.files[file].emplace_back(folder / file);
  }
  for (const auto& [kind, files] : s.files) {
    for (const StoredFile& file : files) {
      if (s.manifest.schema_version > 1 && !file.has_checksums() && !file.entries().empty()) fail(file.path().string(), ": has no checksums");
      for (const auto& [name, entry] : file.entries()) s.listed[kind][name] = {kind, entry.spec.dtype, entry.spec.shape};
    }
  }
}

CheckpointReader::~CheckpointReader() = default;
CheckpointReader::CheckpointReader(CheckpointReader&&) noexcept = default;

const std::filesystem::path& CheckpointReader::folder() const noexcept { return state_->folder; }
const Manifest& CheckpointReader::manifest() const noexcept { return state_->manifest; }

std::vector<std::string> CheckpointReader::tensor_files() const {
  std::vector<std::string> names;
  for (const auto& [name, files] : state_->files) names.push_back(name);
  return names;
}

const std::map<std::string, StoredTensor>& CheckpointReader::tensors(const std::string& file) const { return state_->listed[file]; }

void CheckpointReader::fill(const std::string& file, std::span<Piece> pieces) const {
  std::vector<Needed> needed;
  std::vector<BlockReads::Read> reads;
  for (const Piece& piece : pieces) {
    const auto [stored, entry] = state_->find(file, piece.name);
    const std::string where = text((state_->folder / file).string(), ": tensor '", piece.name, "'");
    const TensorSpec& spec = entry.spec;
    if (spec.shape != piece.shape)
      fail(where, ": has shape ", describe(spec.shape), ", but ", describe(piece.shape), " is wanted");
    if (spec.dtype != piece.local.scalar_type() &&
        !(is_floating(spec.dtype) && is_floating(piece.local.scalar_type()))) {
      fail(where, ": holds ", c10::toString(spec.dtype), ", but ", c10::toString(piece.local.scalar_type()),
           " is wanted");
    }
    if (piece.local.sizes() != at::IntArrayRef(piece.box.size) || !inside(piece.box, spec.shape)) {
      throw std::logic_error(
          text(where, ": ", describe(piece.local.sizes().vec()), " can't take the box ", describe(piece.box)));
    }
    if (elements(piece.box) > 0) need(stored, entry, piece, needed, reads);
  }
  const bool to_gpu = std::any_of(pieces.begin(), pieces.end(), [](const Piece& piece) { return piece.local.is_cuda(); });
  BlockReads blocks(std::move(reads), to_gpu);
  for (const Needed& one : needed) {
    const std::span<const std::byte> bytes = blocks.next();
    if (!one.rows.empty()) take(one, bytes);
  }
}

void CheckpointReader::stream(const std::string& file, const std::string& name,
                              const std::function<void(const Tensor&)>& visit) const {
  for (int64_t number = 0; number < blocks(file, name); ++number) {
    const StoredBlock here = block(file, name, number);
    if (!here.complaint.empty()) throw DamagedCheckpoint(here.complaint);
    visit(here.values);
  }
}

int64_t CheckpointReader::blocks(const std::string& file, const std::string& name) const { return state_->find(file, name).entry.spec.blocks().count(); }

StoredBlock CheckpointReader::block(const std::string& file, const std::string& name, int64_t number) const {
  const auto [stored, entry] = state_->find(file, name);
  StoredBlock out{at::empty({entry.spec.blocks().run(number).size()}, at::TensorOptions(entry.spec.dtype)), 0, ""};
  stored.expect(entry, number + 1, number + kAhead);
  out.complaint = stored.read(entry, number, bytes_of(out.values), out.checksum);
  return out;
}

std::vector<uint64_t> CheckpointReader::checksums(const std::string& file, const std::string& name) const {
  const auto [stored, entry] = state_->find(file, name);
  std::vector<uint64_t> out;
  for (int64_t number = 0; stored.has_checksums() && number < entry.spec.blocks().count(); ++number) out.push_back(stored.checksum_of(entry, number));
  return out;
}

}  // namespace upcycle
