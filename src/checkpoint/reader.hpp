#pragma once
#include <c10/core/ScalarType.h>

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "checkpoint/damaged.hpp"
#include "checkpoint/manifest.hpp"
#include "checkpoint/piece.hpp"

namespace upcycle {

struct StoredTensor {
  std::string file;
  at::ScalarType dtype;
  Shape shape;
};

/// A block of a tensor (Blocks) as it lies in a file.
struct StoredBlock {
  Tensor values;           ///< 1-d, CPU, of the stored dtype
  uint64_t checksum;       ///< of these values
  std::string complaint;   ///< what is wrong with them; "" for a block that is what was written, as far as the file can tell
};

/// Reads boxes of global tensors, on any layout, each rank by itself (independent reads; nothing here is collective), and checks every
/// block that it touches against its checksum (files of schema version 1 have none). All HDF5 calls of a process, writers' included,
/// must come from one thread.
class CheckpointReader {
 public:
  /// Throws UserError for a missing folder, manifest or file, a file of the wrong size, an unknown schema version.
  explicit CheckpointReader(const std::filesystem::path& folder);
  ~CheckpointReader();
  CheckpointReader(CheckpointReader&&) noexcept;

  const std::filesystem::path& folder() const noexcept;
  const Manifest& manifest() const noexcept;
  /// Those files of the checkpoint that hold tensors, by name.
  std::vector<std::string> tensor_files() const;
  /// All tensors of `file` (kWeightsFile, ...: checkpoint/writer.hpp), by name; empty when the checkpoint has no such
  /// file.
  const std::map<std::string, StoredTensor>& tensors(const std::string& file) const;

  /// Fills each piece's `local` (allocated by the caller, any strides, CPU or CUDA) with its box. The stored dtype may
  /// differ from local's: values are converted (round to nearest even). Throws UserError naming tensor, file and shapes
  /// when they disagree, DamagedCheckpoint naming tensor, elements and bytes for a block that is not what was written.
  void fill(const std::string& file, std::span<Piece> pieces) const;

  /// Shows all elements of a tensor to `visit`, in row-major order, in bounded parts: 1-d CPU tensors of the stored
  /// dtype, valid during the call. Throws DamagedCheckpoint like fill.
  void stream(const std::string& file, const std::string& name,
              const std::function<void(const Tensor& part)>& visit) const;

  /// The blocks of a tensor, one by one, sound or not.
  int64_t blocks(const std::string& file, const std::string& name) const;
  StoredBlock block(const std::string& file, const std::string& name, int64_t number) const;
  /// The checksums that are stored for them; empty in files of schema version 1.
  std::vector<uint64_t> checksums(const std::string& file, const std::string& name) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace upcycle
