#pragma once
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "checkpoint/durable.hpp"

namespace upcycle {

/// CRC-32C (Castagnoli, reflected polynomial 0x82f63b78; RFC 3720, appendix B.4).
uint32_t crc32c(std::string_view bytes) noexcept;

/// A number under its name; TensorBoard draws all names before the first '/' as one group.
struct Scalar {
  std::string tag;
  double value;   ///< stored as a float; NaN and infinity are shown as such
};

/// An event file of TensorBoard, written by one process. A file is a row of records (tensorflow/core/lib/io/record_writer.h): length,
/// uint64; masked CRC-32C of the length's bytes; the data; masked CRC-32C of the data; all little-endian. The data is an Event
/// (tensorflow/core/util/event.proto), a protocol buffer of which we write wall_time, step, file_version, summary and session_log.
/// Each event is one write to the system: a process that is killed leaves whole events.
class EventFile {
 public:
  /// Makes `directory`, and in it a new file, sorted behind those of earlier starts. It begins with SessionLog START at `first_step`:
  /// readers forget what earlier files have of that step and later ones. Throws LonelyMistake naming the file when it can't be written.
  EventFile(const std::filesystem::path& directory, int64_t first_step);

  /// Throws LonelyMistake naming the file, when the disk is full for example.
  void add(int64_t step, const std::vector<Scalar>& scalars);

  const std::filesystem::path& path() const noexcept { return path_; }

 private:
  void write(std::string_view event);

  std::filesystem::path path_;
  FileDescriptor file_;
  uint64_t size_ = 0;
};

}  // namespace upcycle
