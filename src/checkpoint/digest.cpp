#include "checkpoint/digest.hpp"

#include <xxhash.h>

#include "base/error.hpp"

namespace upcycle {

std::string digest_of(std::string_view bytes) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits(bytes.data(), bytes.size()));
  std::string hex;
  for (const unsigned char byte : canonical.digest) {
    hex += "0123456789abcdef"[byte >> 4];
    hex += "0123456789abcdef"[byte & 15];
  }
  return hex;
}

std::string digest_of(std::span<const TensorSpec> specs, std::span<const uint64_t> checksums) {
  std::string said;
  size_t next = 0;
  for (const TensorSpec& spec : specs) {
    said += text(spec.name, '\n', c10::toString(spec.dtype), '\n', describe(spec.shape), '\n');
    const auto count = static_cast<size_t>(spec.blocks().count());
    for (const uint64_t sum : checksums.subspan(next, count)) {
      for (int byte = 0; byte < 8; ++byte) said += static_cast<char>(sum >> (8 * byte));   // little-endian
    }
    next += count;
  }
  return digest_of(said);
}

std::string digest_of_tensors(const nlohmann::json& tensors) {
  std::string said;
  for (const auto& [file, summary] : tensors.items()) said += file + '\n' + summary.value("digest", "") + '\n';
  return digest_of(said);
}

}  // namespace upcycle
