#include "checkpoint/reader.hpp"

#include <ATen/ops/empty.h>

#include "base/error.hpp"
#include "checkpoint/slabs.hpp"
#include "checkpoint/tensor_file.hpp"

namespace upcycle {
namespace {

bool is_floating(at::ScalarType dtype) { return c10::isFloatingType(dtype); }

/// Straight into `local` where it is plain memory of the stored dtype; else through one small host buffer.
void fill_piece(const StoredDataset& dataset, const Box& box, const Tensor& local) {
  const at::ScalarType stored = dataset.spec().dtype;
  for (const Box& slab : slabs(box.size, kSlabBytes / static_cast<int64_t>(c10::elementSize(stored)))) {
    Tensor target = view_of(local, slab);
    const Box place = shifted(slab, box.begin);
    if (target.is_cpu() && target.is_contiguous() && target.scalar_type() == stored) {
      dataset.read(place, target.mutable_data_ptr());
      continue;
    }
    const Tensor buffer = at::empty(slab.size, at::TensorOptions(stored));
    dataset.read(place, buffer.mutable_data_ptr());
    target.copy_(buffer);
  }
}

}  // namespace

struct CheckpointReader::State {
  std::filesystem::path folder;
  Manifest manifest;
  std::map<std::string, TensorFile> files;
  mutable std::map<std::string, std::map<std::string, StoredTensor>>
      listed;  ///< made when asked for: it opens every dataset

  const TensorFile& open(const std::string& file) const {
    const auto found = files.find(file);
    if (found == files.end()) fail(folder.string(), ": this checkpoint has no ", file);
    return found->second;
  }

  StoredDataset dataset(const std::string& file, const std::string& name) const {
    const TensorFile& in = open(file);
    if (!in.contains(name)) fail((folder / file).string(), ": tensor '", name, "' is not there");
    return in.dataset(name);
  }
};

CheckpointReader::CheckpointReader(const std::filesystem::path& folder) : state_(std::make_unique<State>()) {
  state_->folder = folder;
  state_->manifest = read_manifest(folder);
  check_complete(folder, state_->manifest);
  for (const auto& [file, size] : state_->manifest.files.items()) {
    if (std::filesystem::path(file).extension() == ".h5") state_->files.emplace(file, TensorFile::open(folder / file));
  }
}

CheckpointReader::~CheckpointReader() = default;
CheckpointReader::CheckpointReader(CheckpointReader&&) noexcept = default;

const std::filesystem::path& CheckpointReader::folder() const noexcept { return state_->folder; }
const Manifest& CheckpointReader::manifest() const noexcept { return state_->manifest; }

std::vector<std::string> CheckpointReader::tensor_files() const {
  std::vector<std::string> names;
  for (const auto& [name, file] : state_->files) names.push_back(name);
  return names;
}

const std::map<std::string, StoredTensor>& CheckpointReader::tensors(const std::string& file) const {
  const auto [entry, is_new] = state_->listed.try_emplace(file);
  if (is_new && state_->files.contains(file)) {
    for (TensorSpec& spec : state_->files.at(file).list())
      entry->second[spec.name] = {file, spec.dtype, std::move(spec.shape)};
  }
  return entry->second;
}

void CheckpointReader::fill(const std::string& file, std::span<Piece> pieces) const {
  for (Piece& piece : pieces) {
    const StoredDataset dataset = state_->dataset(file, piece.name);
    const std::string where = text((state_->folder / file).string(), ": tensor '", piece.name, "'");
    const TensorSpec& spec = dataset.spec();
    if (spec.shape != piece.shape)
      fail(where, ": has shape ", describe(spec.shape), ", but ", describe(piece.shape), " is wanted");
    if (spec.dtype != piece.local.scalar_type() &&
        !(is_floating(spec.dtype) && is_floating(piece.local.scalar_type()))) {
      fail(where, ": holds ", c10::toString(spec.dtype), ", but ", c10::toString(piece.local.scalar_type()),
           " is wanted");
    }
    if (piece.local.sizes() != at::IntArrayRef(piece.box.size)) {
      throw std::logic_error(
          text(where, ": ", describe(piece.local.sizes().vec()), " can't take the box ", describe(piece.box)));
    }
    fill_piece(dataset, piece.box, piece.local.detach());
  }
}

void CheckpointReader::stream(const std::string& file, const std::string& name,
                              const std::function<void(const Tensor&)>& visit) const {
  const StoredDataset dataset = state_->dataset(file, name);
  const TensorSpec& spec = dataset.spec();
  for (const Box& slab : slabs(spec.shape, kSlabBytes / static_cast<int64_t>(c10::elementSize(spec.dtype)))) {
    const Tensor buffer = at::empty({elements(slab)}, at::TensorOptions(spec.dtype));
    dataset.read(slab, buffer.mutable_data_ptr());
    visit(buffer);
  }
}

}  // namespace upcycle
