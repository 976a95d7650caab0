#include "train/run_history.hpp"

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "base/error.hpp"
#include "base/log.hpp"

namespace upcycle {
namespace {

using Line = nlohmann::ordered_json;

double number_of(const Line& line, const char* key) {
  const auto found = line.find(key);
  return found != line.end() && found->is_number() ? found->get<double>() : RunHistory::kNone;
}

// The mean of a column: of numbers, or of lists of numbers, one of each layer. Null is no number.
double mean_of(const Line& line, const char* key) {
  double sum = 0.0;
  int64_t count = 0;
  const auto take = [&](const Line& value) {
    if (value.is_number()) sum += value.get<double>(), ++count;
  };
  const auto column = line.find(key);
  if (column == line.end()) return RunHistory::kNone;
  for (const Line& layer : *column) {
    if (layer.is_array()) {
      for (const Line& value : layer) take(value);
    } else {
      take(layer);
    }
  }
  return count > 0 ? sum / static_cast<double>(count) : RunHistory::kNone;
}

template <class Told>
void take_back(std::vector<Told>& told, int64_t after) {
  while (!told.empty() && told.back().step > after) told.pop_back();
}

// A start at step 0 validates again, too.
template <class Told>
void put(std::vector<Told>& told, const Told& one) {
  take_back(told, one.step - 1);
  told.push_back(one);
}

}  // namespace

void RunHistory::add(const nlohmann::ordered_json& line, int64_t offset) {
  const auto& kind = line.at("kind").get_ref<const std::string&>();
  if (kind == "start" || kind == "rollback") {
    const auto step = line.at("step").get<int64_t>();
    take_back(steps_, step);
    take_back(validations_, step);
    take_back(experts_, step);
    if (kind == "start") starts_.push_back({step});
  } else if (kind == "step") {
    Step step{.step = line.at("step").get<int64_t>(), .tokens = line.at("tokens").get<int64_t>()};
    step.loss = number_of(line, "loss");
    step.gradient_norm = number_of(line, "grad_norm");
    step.tokens_per_second = number_of(line, "tokens_per_second");
    step.seconds = line.value("seconds", 0.0);
    step.skipped = line.value("skipped", false);
    step.load_max_over_mean = number_of(line, "load_max_over_mean");
    step.router_entropy = number_of(line, "router_entropy");
    step.dead_experts = line.value("dead_experts", int64_t{0});
    step.offset = offset;
    put(steps_, step);
    if (!starts_.empty()) starts_.back().seconds += step.seconds;
  } else if (kind == "validation") {
    put(validations_, {line.at("step").get<int64_t>(), number_of(line, "loss")});
  } else if (kind == "experts") {
    put(experts_, {line.at("step").get<int64_t>(), mean_of(line, "cosine"), mean_of(line, "cosine_between"), mean_of(line, "cosine_inside"),
                   mean_of(line, "distance")});
  } else if (kind == "end" && !starts_.empty()) {
    starts_.back().seconds = line.at("seconds").get<double>();
  }
}

int64_t RunHistory::read(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return 0;
  int64_t offset = 0, number = 0;
  for (std::string text_line; std::getline(file, text_line);) {
    ++number;
    if (file.eof()) {   // no newline at its end
      file.close();
      std::filesystem::resize_file(path, static_cast<uintmax_t>(offset));
      break;
    }
    try {
      add(Line::parse(text_line), offset);
    } catch (const Line::exception& error) {
      log::warning(text(path.string(), ", line ", number, " is left out: ", error.what()));
    }
    offset += static_cast<int64_t>(text_line.size()) + 1;
  }
  return offset;
}

ExpertUse use_since_last_look(const RunHistory& history, const std::filesystem::path& path) {
  const int64_t after = history.experts().empty() ? 0 : history.experts().back().step;
  ExpertUse use;
  std::ifstream file(path, std::ios::binary);
  for (const RunHistory::Step& step : history.steps()) {
    if (step.step <= after) continue;
    std::string text_line;
    file.clear();
    file.seekg(step.offset);
    std::getline(file, text_line);
    const Line line = Line::parse(text_line, nullptr, /*allow_exceptions=*/false);
    if (!line.is_object() || !line.contains("tokens_per_expert")) continue;   // somebody changed the file: no reason to end the run
    const Line entropies = line.value("router_entropy_by_layer", Line::array());   // earlier versions did not tell it
    const auto& layers = line.at("tokens_per_expert");
    use.load.resize(layers.size(), std::vector<double>(layers.at(0).size(), 0.0));
    use.entropy.resize(layers.size(), 0.0);
    ++use.steps;
    for (size_t layer = 0; layer < layers.size(); ++layer) {
      for (size_t e = 0; e < use.load[layer].size(); ++e) use.load[layer][e] += layers[layer].at(e).get<double>();
      use.entropy[layer] += layer < entropies.size() && entropies[layer].is_number() ? entropies[layer].get<double>() : RunHistory::kNone;
    }
  }
  for (size_t layer = 0; layer < use.load.size(); ++layer) {
    double sum = 0.0;
    int64_t dead = 0;
    for (const double tokens : use.load[layer]) sum += tokens, dead += tokens == 0;
    for (double& tokens : use.load[layer]) tokens /= std::max(sum, 1.0);
    use.dead.push_back(dead);
    use.entropy[layer] /= static_cast<double>(use.steps);
  }
  return use;
}

}  // namespace upcycle
