#include "train/event_file.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <charconv>
#include <chrono>
#include <span>

#include "base/error.hpp"
#include "base/fault.hpp"
#include "base/process.hpp"

namespace upcycle {
namespace {

constexpr std::array<uint32_t, 256> crc_table() {
  std::array<uint32_t, 256> table{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t crc = byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0x82f63b78u : 0u);
    table[byte] = crc;
  }
  return table;
}

// So that a CRC stored beside data with CRCs in it does not confuse (tensorflow/core/lib/hash/crc32c.h).
uint32_t masked_crc(std::string_view bytes) {
  const uint32_t crc = crc32c(bytes);
  return (crc >> 15 | crc << 17) + 0xa282ead8u;
}

template <class Integer>
void put_little_endian(std::string& out, Integer value) {
  for (size_t byte = 0; byte < sizeof value; ++byte) out += static_cast<char>(value >> 8 * byte & 0xff);
}

// Protocol buffers: a field is a key (its number and kind) and a value (protobuf.dev/programming-guides/encoding).
enum Kind : uint64_t { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

void put_varint(std::string& out, uint64_t value) {
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(value | 0x80);
  out += static_cast<char>(value);
}

void put_key(std::string& out, uint64_t field, Kind kind) { put_varint(out, field << 3 | kind); }

void put_bytes(std::string& out, uint64_t field, std::string_view value) {
  put_key(out, field, kBytes);
  put_varint(out, value.size());
  out += value;
}

// message Event { double wall_time = 1; int64 step = 2; oneof what { string file_version = 3; Summary summary = 5;
//                 SessionLog session_log = 7; } }
constexpr uint64_t kFileVersion = 3, kSummary = 5, kSessionLog = 7;
std::string event(int64_t step, uint64_t what, std::string_view content) {
  const double now = std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  std::string out;
  put_key(out, 1, kFixed64);
  put_little_endian(out, std::bit_cast<uint64_t>(now));
  put_key(out, 2, kVarint);
  put_varint(out, static_cast<uint64_t>(step));
  put_bytes(out, what, content);
  return out;
}

// message Summary { message Value { string tag = 1; float simple_value = 2; } repeated Value value = 1; }
std::string summary(const std::vector<Scalar>& scalars) {
  std::string out;
  for (const Scalar& scalar : scalars) {
    std::string value;
    put_bytes(value, 1, scalar.tag);
    put_key(value, 2, kFixed32);
    put_little_endian(value, std::bit_cast<uint32_t>(static_cast<float>(scalar.value)));
    put_bytes(out, 1, value);
  }
  return out;
}

// message SessionLog { enum SessionStatus { START = 1; } SessionStatus status = 1; }
std::string session_start() {
  std::string out;
  put_key(out, 1, kVarint);
  put_varint(out, 1);
  return out;
}

constexpr std::string_view kPrefix = "events.out.tfevents.";

// Readers take the files of a directory in the order of their names, which begin with the time: a new one must be behind all others,
// even if it comes in the same second, or the clock went back.
int64_t seconds_behind(const std::filesystem::path& directory) {
  int64_t seconds = std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch()).count();
  std::error_code none;
  for (const auto& entry : std::filesystem::directory_iterator(directory, none)) {
    const std::string name = entry.path().filename().string();
    int64_t theirs = 0;
    if (!name.starts_with(kPrefix)) continue;
    const char *const first = name.data() + kPrefix.size(), *const last = name.data() + name.size();
    if (std::from_chars(first, last, theirs).ec == std::errc()) seconds = std::max(seconds, theirs + 1);
  }
  return seconds;
}

}  // namespace

uint32_t crc32c(std::string_view bytes) noexcept {
  static constexpr std::array<uint32_t, 256> kTable = crc_table();
  uint32_t crc = ~0u;
  for (const char byte : bytes) crc = kTable[(crc ^ static_cast<uint8_t>(byte)) & 0xff] ^ crc >> 8;
  return ~crc;
}

EventFile::EventFile(const std::filesystem::path& directory, int64_t first_step) {
  const Process self = this_process();
  path_ = directory / text(kPrefix, seconds_behind(directory), '.', self.host, '.', self.pid, ".0");
  try {
    file_ = create_file(path_);
  } catch (const UserError& error) {
    throw LonelyMistake(error.what());
  }
  write(event(0, kFileVersion, "brain.Event:2"));
  write(event(first_step, kSessionLog, session_start()));
}

void EventFile::add(int64_t step, const std::vector<Scalar>& scalars) { write(event(step, kSummary, summary(scalars))); }

void EventFile::write(std::string_view event) {
  std::string record;
  put_little_endian(record, static_cast<uint64_t>(event.size()));
  put_little_endian(record, masked_crc(record));
  record += event;
  put_little_endian(record, masked_crc(event));
  try {
    write_at(file_, std::as_bytes(std::span(record)), size_, path_);
  } catch (const UserError& error) {
    throw LonelyMistake(error.what());
  }
  size_ += record.size();
}

}  // namespace upcycle
