#pragma once
#include <optional>
#include <string>
#include <vector>

namespace upcycle {

/// What a command takes, and its page of help.
struct Usage {
  std::string command;
  std::vector<std::string> arguments;
  bool run_file;  ///< takes --set
  std::string summary;   ///< one line, for the list of commands
  std::string details;   ///< below it on the command's own page
  std::string example;
  std::optional<std::string> further = {};  ///< one more argument that may be left out
};

/// Of all commands, in the order of the general help.
const std::vector<Usage>& usages();

}  // namespace upcycle
