#pragma once
#include <sys/types.h>

#include <string>
#include <vector>

namespace upcycle {

/// A program that works for this one: it reads lines from its standard input and answers each by one line on its standard output.
/// It ends with this object, or, when this process dies, at the end of its input; no zombie is left.
class ChildProcess {
 public:
  /// Starts `command`; its first word is a path, or is looked for in PATH. Throws UserError when it can't be started.
  explicit ChildProcess(std::vector<std::string> command);
  /// Ends its input, and, should it still be there after two seconds, the child.
  ~ChildProcess();
  ChildProcess(const ChildProcess&) = delete;
  ChildProcess& operator=(const ChildProcess&) = delete;

  /// `line` without its end, of any length; waits for the child to take it. A child that answers before it has read the whole line may
  /// answer no more than a pipe holds. Throws std::runtime_error, with its exit code and its last words on standard error, when it
  /// has ended.
  void write_line(std::string line);
  /// The next line, without its end. Throws like write_line.
  std::string read_line();

 private:
  [[noreturn]] void fail_ended();
  /// The child's exit status once it has ended; waits up to `seconds`, then kills it.
  int wait_or_kill(double seconds) noexcept;

  std::vector<std::string> command_;
  int socket_ = -1;    ///< both directions
  int errors_ = -1;    ///< what it wrote to standard error: memory, so that nobody has to read it
  pid_t pid_ = -1;     ///< -1: waited for
  std::string read_;   ///< and not yet asked for
};

}  // namespace upcycle
