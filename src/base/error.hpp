#pragma once
#include <exception>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>

namespace upcycle {

/// The user's mistake (a wrong key, a missing file, numbers that do not divide): one clear message, exit code 2.
/// Everything else that is thrown is a fault: exit code 1.
class UserError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// Joins its arguments as `operator<<` prints them.
template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return std::move(out).str();
}

/// Throws UserError with the joined parts. Say what is wrong, with the file, key or numbers, and what to do.
template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw UserError(text(parts...));
}

/// Runs `action`; an exception that leaves it gets `what` put in front ("reading model.safetensors: ..."), its kind kept.
template <class Action>
auto while_doing(const std::string& what, Action&& action) -> decltype(action()) {
  try {
    return std::forward<Action>(action)();
  } catch (const UserError& error) {
    throw UserError(what + ": " + error.what());
  } catch (const std::exception& error) {
    throw std::runtime_error(what + ": " + error.what());
  }
}

}  // namespace upcycle
