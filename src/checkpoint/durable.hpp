#pragma once
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>

#include "base/handle.hpp"

namespace upcycle {

// Files that survive a power cut: written under another name, fsynced, renamed, and the directory fsynced. A rename
// without the first fsync can leave an empty file; one without the second can be forgotten.

void close_descriptor(int descriptor) noexcept;
constexpr int no_descriptor() noexcept { return -1; }
using FileDescriptor = Handle<int, close_descriptor, no_descriptor>;

/// Throws UserError "<doing> <path>: <what the system says> (what to do)" for the errno at hand.
[[noreturn]] void fail_with_errno(const std::string& doing, const std::filesystem::path& path);

/// Creates or empties `path`, makes missing parent directories. Throws UserError naming it.
FileDescriptor create_file(const std::filesystem::path& path);
/// The file is `bytes` long from now on, what is in it stays, and its room is taken where the file system can do so: a full disk shows at
/// once. Throws UserError naming `path` and the bytes.
void reserve(const FileDescriptor&, uint64_t bytes, const std::filesystem::path& path);
/// Writes all of `bytes` at `offset`. Throws UserError naming `path` when the disk is full or fails.
void write_at(const FileDescriptor&, std::span<const std::byte> bytes, uint64_t offset,
              const std::filesystem::path& path);
/// Fills `bytes` from `offset`, as far as the file goes; returns how many. Throws UserError naming `path`.
size_t read_at(const FileDescriptor&, std::span<std::byte> bytes, uint64_t offset, const std::filesystem::path& path);
/// Makes a directory and its missing parents, each durable in the one that it is in. Throws UserError naming the one that can't be made.
void make_directories(const std::filesystem::path& path);
/// fsync of a file or a directory. Throws UserError naming it.
void make_durable(const std::filesystem::path& path);
/// Renames and makes the new name durable. Throws UserError naming both.
void rename_durably(const std::filesystem::path& from, const std::filesystem::path& to);
/// The whole of a small file, whole or absent: <path>.partial, fsync, rename, fsync.
void write_text_durably(const std::filesystem::path& path, const std::string& content);

/// The path itself, or the nearest one above it that is there; absolute.
std::filesystem::path existing_part(const std::filesystem::path& path);

/// Throws UserError with both numbers when the file system of `path` (or of its nearest existing parent) has less than
/// `bytes_needed` free for `what` ("step 0 and one checkpoint").
void check_free_space(const std::filesystem::path& path, uint64_t bytes_needed, const std::string& what);

}  // namespace upcycle
