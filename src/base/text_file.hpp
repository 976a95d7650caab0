#pragma once
#include <filesystem>
#include <string>

namespace upcycle {

/// All of a small file. Throws UserError naming it.
std::string text_of(const std::filesystem::path& path);

}  // namespace upcycle
