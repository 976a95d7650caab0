#include "base/text_file.hpp"

#include <fstream>
#include <iterator>

#include "base/error.hpp"

namespace upcycle {

std::string text_of(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  std::string content{std::istreambuf_iterator<char>(file), {}};
  if (!file) fail(path.string(), ": can't be read");
  return content;
}

}  // namespace upcycle
