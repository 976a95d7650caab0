// The kinds of keys that hold several values: lists, and texts that stand for some.
#include <charconv>
#include <set>

#include "config/field_kinds.hpp"

namespace upcycle {
using nlohmann::json;

namespace {

/// `form` says what is expected; `problem` judges an entry.
template <class T, class Problem>
Field list_of(std::string key, std::vector<T>& place, const char* form, Problem problem) {
  return {std::move(key),
          [&place, form, problem](const json& value) {
            if (!value.is_array()) return text(form, ", not ", shown(value));
            std::vector<T> read;
            for (const json& entry : value) {
              if (const std::string found = problem(entry); !found.empty()) return text("entry ", read.size() + 1, ": ", found);
              read.push_back(entry);
            }
            place = read;
            return std::string();
          },
          [&place] { return json(place); }};
}

}  // namespace

Field word_list(std::string key, std::vector<std::string>& place) {
  return list_of(std::move(key), place, "a list of strings is expected, such as [\"a\", \"b\"]", [](const json& word) {
    return !word.is_string() || word == "" ? "a text is expected, not " + shown(word) : "";
  });
}

Field integer_list(std::string key, std::vector<int64_t>& place, int64_t least) {
  return list_of(std::move(key), place, "a list of integers is expected, such as [4, 4]",
                 [least](const json& number) { return integer_problem(number, least, kAny); });
}

namespace {

std::string blend_problem(const json& value, std::vector<Blend>& blend) {
  constexpr auto kForm = "\"mock\" or a list such as [[1.0, \"prefix\"], ...] is expected";
  if (value.is_string()) {
    if (value != "mock") return text(kForm, "; for one data set write [[1.0, ", value.dump(), "]]");
    blend = {{1.0, "mock"}};
    return "";
  }
  if (!value.is_array()) return text(kForm, ", not ", shown(value));
  std::vector<Blend> read;
  for (const json& entry : value) {
    const std::string where = text("entry ", read.size() + 1, ": ");
    if (!entry.is_array() || entry.size() != 2 || !entry[1].is_string())
      return text(where, "[weight, \"prefix\"] is expected");
    if (const std::string found = number_problem(entry[0], kPositive); !found.empty())
      return text(where, "weight: ", found);
    if (entry[1] == "") return where + "the prefix is empty";
    read.push_back({entry[0].get<double>(), entry[1].get<std::string>()});
  }
  blend = read;
  return "";
}

}  // namespace

Field blend(std::string key, std::vector<Blend>& place) {
  return {std::move(key), [&place](const json& value) { return blend_problem(value, place); },
          [&place] {
            if (place == std::vector<Blend>{{1.0, "mock"}}) return json("mock");
            json list = json::array();
            for (const auto& [weight, prefix] : place) list.push_back(json::array({weight, prefix}));
            return list;
          }};
}

namespace {

std::string layers_problem(const json& value, std::string& layers) {
  constexpr auto kForm = "\"all\", \"every:2\", \"first-dense:1\" or a list such as [0, 1, 2] is expected";
  if (value.is_array()) {
    std::set<int64_t> seen;
    for (const json& layer : value) {
      if (const std::string found = integer_problem(layer, 0, kAny); !found.empty())
        return text("entry ", seen.size() + 1, ": ", found);
      if (!seen.insert(layer.get<int64_t>()).second) return text("layer ", layer.dump(), " is listed twice");
    }
    if (seen.empty()) return "the list is empty: leave [moe] out for a dense model";
    layers = value.dump();
    return "";
  }
  if (!value.is_string()) return text(kForm, ", not ", shown(value));
  const std::string& rule = value.get_ref<const std::string&>();
  const size_t colon = rule.find(':');
  if (colon != std::string::npos) {
    int64_t count = 0;
    const char* end = rule.data() + rule.size();
    const auto [rest, code] = std::from_chars(rule.data() + colon + 1, end, count);
    const std::string name = rule.substr(0, colon);
    const bool known = (name == "every" && count >= 1) || (name == "first-dense" && count >= 0);
    if (code != std::errc() || rest != end || !known) return text(kForm, ", not ", shown(value));
  } else if (rule != "all") {
    return text(kForm, ", not ", shown(value));
  }
  layers = rule;
  return "";
}

}  // namespace

Field layers(std::string key, std::string& place) {
  return {std::move(key), [&place](const json& value) { return layers_problem(value, place); },
          [&place] { return place.starts_with('[') ? json::parse(place) : json(place); }};
}

namespace {

std::string layer_counts_problem(const json& value, std::vector<int64_t>& counts) {
  constexpr auto kForm = "numbers of layers such as \"3|4|4|3\" are expected";
  if (!value.is_string()) return text(kForm, ", not ", shown(value));
  const std::string& written = value.get_ref<const std::string&>();
  std::vector<int64_t> read;
  const char *at = written.data(), *end = at + written.size();
  while (at != end) {
    int64_t count = 0;
    const auto [rest, code] = std::from_chars(at, end, count);
    const bool goes_on = rest != end && *rest == '|' && rest + 1 != end;
    if (code != std::errc() || (rest != end && !goes_on)) return text(kForm, ", not ", shown(value));
    read.push_back(count);
    if (count < 1) return text("entry ", read.size(), " of ", value.dump(), " is ", count, ": every chunk needs at least one layer");
    at = goes_on ? rest + 1 : rest;
  }
  counts = read;
  return "";
}

}  // namespace

Field layer_counts(std::string key, std::vector<int64_t>& place) {
  return {std::move(key), [&place](const json& value) { return layer_counts_problem(value, place); },
          [&place] {
            std::string written;
            for (const int64_t count : place) written += (written.empty() ? "" : "|") + std::to_string(count);
            return json(written);
          },
          true};
}

}  // namespace upcycle
