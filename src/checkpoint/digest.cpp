#include "checkpoint/digest.hpp"

#include <xxhash.h>

#include <memory>

#include "base/error.hpp"

namespace upcycle {

std::string digest(const CheckpointReader& reader, const SeePart& also) {
  struct Free {
    void operator()(XXH3_state_t* state) const { XXH3_freeState(state); }
  };
  const std::unique_ptr<XXH3_state_t, Free> state(XXH3_createState());
  XXH3_128bits_reset(state.get());
  for (const std::string& file : reader.tensor_files()) {
    for (const auto& [name, tensor] : reader.tensors(file)) {
      const std::string title =
          text(file, '\n', name, '\n', c10::toString(tensor.dtype), '\n', describe(tensor.shape), '\n');
      XXH3_128bits_update(state.get(), title.data(), title.size());
      reader.stream(file, name, [&](const Tensor& part) {
        XXH3_128bits_update(state.get(), part.const_data_ptr(), part.nbytes());
        if (also) also(file, name, part);
      });
    }
  }
  XXH128_canonical_t bytes;
  XXH128_canonicalFromHash(&bytes, XXH3_128bits_digest(state.get()));
  std::string hex;
  for (const unsigned char byte : bytes.digest) {
    hex += "0123456789abcdef"[byte >> 4];
    hex += "0123456789abcdef"[byte & 15];
  }
  return hex;
}

}  // namespace upcycle
