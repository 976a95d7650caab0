#pragma once
#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <set>
#include <string>
#include <vector>

#include "base/child_process.hpp"

namespace upcycle {

/// Text to token ids and back by Hugging Face's `tokenizers`, in a Python of its own: tools/tokens, which is libexec/upcycle/tokens
/// beside the bin of an installed program. Python is that of UPCYCLE_PYTHON, the one that the program was built with, or python3.
class Tokenizer {
 public:
  /// `directory` holds a tokenizer.json. Throws UserError: it does not, Python or the script are not found (with what was looked for), or
  /// `tokenizers` can't read the file.
  explicit Tokenizer(const std::filesystem::path& directory);

  /// Throws UserError when `text` is not UTF-8.
  std::vector<int64_t> encode(const std::string& text);
  /// Special tokens are shown; bytes that are no UTF-8 become U+FFFD.
  std::string decode(const std::vector<int64_t>& ids);
  /// All ids are below.
  int64_t vocabulary() const noexcept { return vocabulary_; }

 private:
  nlohmann::json ask(const nlohmann::json& request);

  std::filesystem::path directory_;
  ChildProcess child_;
  int64_t vocabulary_ = 0;
};

/// The text of tokens that come one at a time: a character is handed on once all of its bytes are there.
class TextStream {
 public:
  /// `before`: the tokens in front (what a word's first token looks like may depend on them); their text is not handed on.
  TextStream(Tokenizer&, const std::vector<int64_t>& before);
  /// The text that `id` completes; may be empty.
  std::string push(int64_t id);
  /// What is left at the end, with U+FFFD for what never became a character.
  std::string rest();

 private:
  Tokenizer& tokenizer_;
  std::vector<int64_t> ids_;   ///< those of the text handed on last, then those that wait
  size_t told_ = 0;            ///< how many of them are told
  std::string told_text_;      ///< of these
};

/// The tokens that end a text: eos_token_id of `directory`'s generation_config.json, or, where there is none, of `config`, the model's
/// config.json; as transformers does. May be empty. Throws UserError when it is no token and no list of them.
std::set<int64_t> end_tokens(const std::filesystem::path& directory, const nlohmann::json& config);

}  // namespace upcycle
