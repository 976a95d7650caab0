// libFuzzer: a .safetensors file of any bytes. Only UserError may leave what reads its header; the tensors that it finds tile the file.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "base/error.hpp"
#include "checkpoint/safetensors_header.hpp"

extern "C" size_t LLVMFuzzerMutate(uint8_t* bytes, size_t size, size_t most);

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  using namespace upcycle;
  const std::span<const std::byte> file(reinterpret_cast<const std::byte*>(bytes), size);
  try {
    const auto tensors = parse_safetensors(file, "model.safetensors");
    uint64_t header = 0, covered = 0;
    std::memcpy(&header, bytes, sizeof header);
    for (const auto& [name, entry] : tensors) {
      if (entry.begin < sizeof header + header || entry.begin > entry.end || entry.end > size) std::abort();
      uint64_t values = 1;
      for (const int64_t extent : entry.shape) {
        if (extent < 0) std::abort();
        values *= static_cast<uint64_t>(extent);
      }
      if (values * c10::elementSize(entry.dtype) != entry.end - entry.begin) std::abort();
      if (safetensors_dtype(safetensors_dtype_name(entry.dtype), name) != entry.dtype) std::abort();
      covered += entry.end - entry.begin;
      volatile uint8_t touched = 0;   // every byte of it is there
      for (uint64_t i = entry.begin; i < entry.end; ++i) touched = touched ^ bytes[i];
    }
    if (covered != size - sizeof header - header) std::abort();
  } catch (const UserError& error) {
    if (std::strncmp(error.what(), "model.safetensors: ", 19) != 0) std::abort();
  }
  return 0;
}

/// Mostly the header alone changes, and its length is told right: else no mutation comes further than that.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* bytes, size_t size, size_t most, unsigned seed) {
  uint64_t length = 0;
  if (size < sizeof length || most < 64 || seed % 8 == 0) return LLVMFuzzerMutate(bytes, size, most);
  std::memcpy(&length, bytes, sizeof length);
  length = std::min<uint64_t>(length, size - sizeof length);
  std::vector<uint8_t> header(bytes + sizeof length, bytes + sizeof length + length), data(bytes + sizeof length + length, bytes + size);
  std::vector<uint8_t>& part = seed % 8 == 1 ? data : header;
  const size_t room = most - sizeof length - (header.size() + data.size() - part.size()), before = part.size();
  part.resize(std::max(room, before));
  part.resize(LLVMFuzzerMutate(part.data(), before, part.size()));
  length = header.size();
  std::memcpy(bytes, &length, sizeof length);
  std::copy(header.begin(), header.end(), bytes + sizeof length);
  std::copy(data.begin(), data.end(), bytes + sizeof length + header.size());
  return sizeof length + header.size() + data.size();
}
