#pragma once
#include <cstdint>
#include <filesystem>
#include <map>
#include <string>

#include "checkpoint/durable.hpp"

namespace upcycle {

/// What is known of a directory's blocks of bytes by number: those that were written, each with its XXH3. One small file for each rank,
/// .resume.<rank>, and one that says whose notes they are, .resume.json.
class BlockNotes {
 public:
  /// True where `directory` has notes of the same `whose`.
  static bool are_of(const std::filesystem::path& directory, const std::string& whose);
  /// Says whose notes will be there, durably.
  static void begin(const std::filesystem::path& directory, const std::string& whose);
  /// All ranks' notes, for parse().
  static std::string read(const std::filesystem::path& directory);
  /// XXH3 by number. A note that was cut off in the middle, or lies in a file that a power cut left full of zeros, is none.
  static std::map<uint64_t, uint64_t> parse(const std::string& notes);
  static void remove(const std::filesystem::path& directory);

  BlockNotes() = default;
  /// This rank's, to add to. Throws UserError naming the file.
  BlockNotes(const std::filesystem::path& directory, int rank);
  void add(uint64_t block, uint64_t hash) const;

 private:
  std::filesystem::path path_;
  FileDescriptor file_;
};

}  // namespace upcycle
