#pragma once
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "train/generate.hpp"
#include "train/tokenizer.hpp"

namespace upcycle {

/// One text of `sample`, told while it comes.
class Telling {
 public:
  /// Prints it where `aloud`. The referenced objects outlive this one.
  Telling(Tokenizer& tokenizer, const GenerationRequest& request, bool aloud)
      : tokenizer_(tokenizer), stream_(tokenizer, request.prompt), aloud_(aloud) {}

  void tell(const GeneratedToken& token);
  /// The rest, and all of it as JSON: tokens, text, ended_by, and routing where the tokens have it.
  nlohmann::ordered_json end(Ending ending);
  const std::vector<GeneratedToken>& tokens() const noexcept { return tokens_; }

 private:
  void say(const std::string& words);

  Tokenizer& tokenizer_;
  TextStream stream_;
  bool aloud_;
  std::string text_;
  std::vector<GeneratedToken> tokens_;
};

/// For each token a line, and for each layer with experts another: expert and weight, best first.
void print_routing(const std::vector<GeneratedToken>& tokens, Tokenizer& tokenizer);

}  // namespace upcycle
