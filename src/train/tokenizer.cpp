#include "train/tokenizer.hpp"

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>

#include "base/error.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;

/// The first that is there. Beside the executable, wherever it was installed or unpacked; else where it was built.
fs::path tokens_script() {
  const fs::path bin = fs::read_symlink("/proc/self/exe").parent_path();
  const std::vector<fs::path> places = {(bin / "../libexec/upcycle/tokens").lexically_normal(), fs::path(UPCYCLE_TOOLS_DIR) / "tokens"};
  std::string looked;
  for (const fs::path& place : places) {
    if (fs::is_regular_file(place)) return place;
    looked += "\n  " + place.string();
  }
  fail("the script that makes tokens is not there; looked for", looked, "\nInstall the program as a whole, or run it where it was built");
}

std::string python() {
  if (const char* named = std::getenv("UPCYCLE_PYTHON"); named && *named) return named;
  return fs::exists(UPCYCLE_BUILD_PYTHON) ? UPCYCLE_BUILD_PYTHON : "python3";
}

std::vector<std::string> command_for(const fs::path& directory) {
  if (!fs::is_regular_file(directory / "tokenizer.json")) {
    fail(directory.string(), ": no tokenizer.json there; --tokenizer DIR names the directory of one");
  }
  return {python(), tokens_script().string(), directory.string()};
}

/// True when text may go on inside of its last character.
bool incomplete(const std::string& text) { return text.ends_with("\xEF\xBF\xBD"); }

}  // namespace

Tokenizer::Tokenizer(const fs::path& directory) : directory_(directory), child_(command_for(directory)) {
  nlohmann::json greeting;
  try {
    greeting = nlohmann::json::parse(child_.read_line());
  } catch (const std::exception& error) {
    fail("no tokenizer: ", error.what());
  }
  if (greeting.contains("error")) fail(greeting["error"].get<std::string>());
  vocabulary_ = greeting.at("vocabulary");
}

nlohmann::json Tokenizer::ask(const nlohmann::json& request) {
  child_.write_line(request.dump());
  const nlohmann::json reply = nlohmann::json::parse(child_.read_line());
  if (reply.contains("error")) throw std::runtime_error(text(directory_.string(), ": ", reply["error"].get<std::string>()));
  return reply;
}

std::vector<int64_t> Tokenizer::encode(const std::string& words) {
  try {
    return ask({{"encode", words}}).at("ids");
  } catch (const nlohmann::json::type_error&) {   // dump() insists on UTF-8
    fail("the text is not valid UTF-8");
  }
}

std::string Tokenizer::decode(const std::vector<int64_t>& ids) { return ask({{"decode", ids}}).at("text"); }

TextStream::TextStream(Tokenizer& tokenizer, const std::vector<int64_t>& before) : tokenizer_(tokenizer) {
  constexpr size_t kEnough = 8;
  ids_.assign(before.end() - static_cast<std::ptrdiff_t>(std::min(before.size(), kEnough)), before.end());
  told_ = ids_.size();
  told_text_ = tokenizer_.decode(ids_);
}

std::string TextStream::push(int64_t id) {
  ids_.push_back(id);
  const std::string all = tokenizer_.decode(ids_);
  if (incomplete(all) || all.size() <= told_text_.size()) return "";
  const std::string more = all.substr(told_text_.size());
  ids_.erase(ids_.begin(), ids_.begin() + static_cast<std::ptrdiff_t>(told_));
  told_ = ids_.size();
  told_text_ = tokenizer_.decode(ids_);
  return more;
}

std::string TextStream::rest() {
  const std::string all = tokenizer_.decode(ids_);
  return all.size() > told_text_.size() ? all.substr(told_text_.size()) : "";
}

std::set<int64_t> end_tokens(const fs::path& directory, const nlohmann::json& config) {
  const fs::path path = directory / "generation_config.json";
  nlohmann::json said = config;
  if (fs::exists(path)) said = nlohmann::json::parse(std::ifstream(path), nullptr, /*allow_exceptions=*/false);
  const nlohmann::json end = said.is_object() ? said.value("eos_token_id", nlohmann::json()) : nlohmann::json();
  if (end.is_null() && said.is_object()) return {};
  try {
    return end.is_array() ? end.get<std::set<int64_t>>() : std::set<int64_t>{end.get<int64_t>()};
  } catch (const nlohmann::json::exception&) {
    fail(fs::exists(path) ? path.string() : "config.json", ": eos_token_id is no token id and no list of them: ", end.dump());
  }
}

}  // namespace upcycle
