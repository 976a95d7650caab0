#pragma once
#include <string>
#include <utility>
#include <vector>

namespace upcycle {

/// "0.1.0".
std::string version();

/// Name and version of every library in use, as found at run time where the library can tell.
std::vector<std::pair<std::string, std::string>> library_versions();

/// What --version prints: program, libraries, transports.
std::string version_page();

}  // namespace upcycle
