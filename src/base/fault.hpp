#pragma once
#include <filesystem>
#include <string>

#include "base/error.hpp"

namespace upcycle {

/// A mistake that one rank meets alone, outside of Communicator::together: the others wait for it and must be ended.
class LonelyMistake : public UserError {
 public:
  using UserError::UserError;
};

/// A fault that all ranks throw alike. It is told once, by the rank whose `speaks` is true.
class CommonFault : public std::runtime_error {
 public:
  CommonFault(bool speaks, const std::string& what) : std::runtime_error(what), speaks(speaks) {}
  bool speaks;
};

/// What the file system has refused (no permission, a mount that is gone) is told as a mistake: the path, and why.
inline UserError mistake_of(const std::filesystem::filesystem_error& refusal) {
  return UserError(text(refusal.path1().string(), ": ", refusal.code().message()));
}

}  // namespace upcycle
