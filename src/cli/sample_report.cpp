#include "cli/sample_report.hpp"

#include <cstdio>
#include <iostream>

namespace upcycle {
namespace {

using nlohmann::ordered_json;

std::string quoted(const std::string& words) { return nlohmann::json(words).dump(); }

ordered_json to_json(const std::vector<ChosenExperts>& routing) {
  ordered_json layers = ordered_json::array();
  for (const ChosenExperts& layer : routing) {
    layers.push_back({{"layer", layer.layer}, {"experts", layer.experts}, {"weights", layer.weights}});
  }
  return layers;
}

}  // namespace

void Telling::tell(const GeneratedToken& token) {
  tokens_.push_back(token);
  say(stream_.push(token.id));
}

void Telling::say(const std::string& words) {
  text_ += words;
  if (aloud_) std::cout << words << std::flush;
}

ordered_json Telling::end(Ending ending) {
  say(stream_.rest());
  ordered_json out = {{"tokens", ordered_json::array()}, {"text", text_}, {"ended_by", name(ending)}};
  for (const GeneratedToken& token : tokens_) {
    out["tokens"].push_back(token.id);
    if (token.routing.empty()) continue;
    out["routing"].push_back({{"token", token.id}, {"text", tokenizer_.decode({token.id})}, {"layers", to_json(token.routing)}});
  }
  return out;
}

void print_routing(const std::vector<GeneratedToken>& tokens, Tokenizer& tokenizer) {
  for (size_t i = 0; i < tokens.size(); ++i) {
    std::cout << "token " << i + 1 << "  " << tokens[i].id << "  " << quoted(tokenizer.decode({tokens[i].id})) << "\n";
    for (const ChosenExperts& layer : tokens[i].routing) {
      char cell[64];
      std::snprintf(cell, sizeof cell, "  layer %3ld ", static_cast<long>(layer.layer));
      std::cout << cell;
      for (size_t k = 0; k < layer.experts.size(); ++k) {
        std::snprintf(cell, sizeof cell, "  %3ld %.3f", static_cast<long>(layer.experts[k]), layer.weights[k]);
        std::cout << cell;
      }
      std::cout << "\n";
    }
  }
}

}  // namespace upcycle
