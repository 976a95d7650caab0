#pragma once
#include <c10/core/ScalarType.h>

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/error.hpp"
#include "checkpoint/manifest.hpp"
#include "checkpoint/piece.hpp"

namespace upcycle {

/// Values of a checkpoint are not those that were written.
class DamagedCheckpoint : public UserError {
 public:
  using UserError::UserError;
};

struct StoredTensor {
  std::string file;
  at::ScalarType dtype;
  Shape shape;
};

/// Reads boxes of global tensors, on any layout, each rank by itself (independent reads; nothing here is collective).
/// All HDF5 calls of a process, writers' included, must come from one thread.
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
  /// when they disagree.
  void fill(const std::string& file, std::span<Piece> pieces) const;

  /// Shows all elements of a tensor to `visit`, in row-major order, in bounded parts: 1-d CPU tensors of the stored
  /// dtype, valid during the call.
  void stream(const std::string& file, const std::string& name,
              const std::function<void(const Tensor& part)>& visit) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace upcycle
