#include "config/field_kinds.hpp"

#include <charconv>
#include <cmath>
#include <set>

namespace upcycle {
using nlohmann::json;

std::string shown(const json& value) {
  switch (value.type()) {
    case json::value_t::boolean:
      return "the boolean " + value.dump();
    case json::value_t::string:
      return "the string " + value.dump();
    case json::value_t::array:
      return "a list";
    case json::value_t::object:
      return "a table";
    case json::value_t::null:
      return "a date or time";
    case json::value_t::number_float: {
      const double number = value;
      return "the float " + (std::isfinite(number) ? value.dump() : text(number));
    }
    default:
      return "the integer " + value.dump();
  }
}

std::string integer_problem(const json& value, int64_t least, int64_t most) {
  if (!value.is_number_integer()) {
    const std::string found = "an integer is expected, not " + shown(value);
    const double number = value.is_number_float() ? value.get<double>() : 0.5;
    const bool whole = std::abs(number) < 9e15 && number == std::floor(number);
    return whole ? text(found, ": write ", static_cast<int64_t>(number)) : found;
  }
  const int64_t number = value;
  if (number < least) return text(number, " is less than ", least);
  if (number > most) return text(number, " is more than ", most);
  return "";
}

Field integer(std::string key, int64_t& place, int64_t least, int64_t most) {
  return {std::move(key),
          [&place, least, most](const json& value) {
            const std::string problem = integer_problem(value, least, most);
            if (problem.empty()) place = value;
            return problem;
          },
          [&place] { return json(place); }};
}

std::string number_problem(const json& value, const Range& range) {
  if (!value.is_number() || !std::isfinite(value.get<double>())) return "a number is expected, not " + shown(value);
  const double number = value;
  if (range.above && number <= range.least) return text(value.dump(), " must be more than ", range.least);
  if (number < range.least) return text(value.dump(), " is less than ", range.least);
  if (range.below && number >= range.most) return text(value.dump(), " must be less than ", range.most);
  if (number > range.most) return text(value.dump(), " is more than ", range.most);
  return "";
}

Field number(std::string key, double& place, Range range) {
  return {std::move(key),
          [&place, range](const json& value) {
            const std::string problem = number_problem(value, range);
            if (problem.empty()) place = value.get<double>();
            return problem;
          },
          [&place] { return json(place); }};
}

Field integer(std::string key, std::optional<int64_t>& place, int64_t least, std::function<int64_t()> in_force) {
  return {std::move(key),
          [&place, least](const json& value) {
            const std::string problem = integer_problem(value, least, kAny);
            if (problem.empty()) place = value.get<int64_t>();
            return problem;
          },
          [in_force] { return json(in_force()); }};
}

Field number(std::string key, std::optional<double>& place, Range range, std::function<double()> in_force) {
  return {std::move(key),
          [&place, range](const json& value) {
            const std::string problem = number_problem(value, range);
            if (problem.empty()) place = value.get<double>();
            return problem;
          },
          [in_force] { return json(in_force()); }};
}

Field flag(std::string key, bool& place) {
  return {std::move(key),
          [&place](const json& value) {
            if (!value.is_boolean()) return "true or false is expected, not " + shown(value);
            place = value;
            return std::string();
          },
          [&place] { return json(place); }};
}

namespace {

/// Text; `problem` says what is wrong with a string, or "".
Field checked_words(std::string key, std::string& place, std::string (*problem)(const std::string&)) {
  return {std::move(key),
          [&place, problem](const json& value) {
            if (!value.is_string()) return "a string is expected, not " + shown(value);
            std::string found = problem(value.get_ref<const std::string&>());
            if (found.empty()) place = value;
            return found;
          },
          [&place] { return json(place); }, true};
}

}  // namespace

Field choice(std::string key, std::string& place, const std::vector<std::string>& names) {
  Choices<std::string> choices;
  for (const std::string& name : names) choices.emplace_back(name, name);
  return choice(std::move(key), place, choices);
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

namespace {

std::string name_problem(const std::string& name) {
  const bool plain =
      name.find_first_not_of("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-") == std::string::npos;
  if (name.empty() || name.starts_with('.') || !plain) {
    return json(name).dump() + ": letters, digits, '.', '_' and '-' make a name, and it does not begin with '.'";
  }
  return "";
}

std::string duration_problem(const std::string& duration) {
  try {
    seconds_from(duration);
    return "";
  } catch (const UserError& error) {
    return error.what();
  }
}

}  // namespace

Field word_list(std::string key, std::vector<std::string>& place) {
  return {std::move(key),
          [&place](const json& value) {
            if (!value.is_array()) return "a list of strings is expected, such as [\"a\", \"b\"], not " + shown(value);
            std::vector<std::string> read;
            for (const json& word : value) {
              if (!word.is_string() || word.get<std::string>().empty()) return text("entry ", read.size() + 1, ": a text is expected, not ", shown(word));
              read.push_back(word);
            }
            place = read;
            return std::string();
          },
          [&place] { return json(place); }};
}

Field integer_list(std::string key, std::vector<int64_t>& place, int64_t least) {
  return {std::move(key),
          [&place, least](const json& value) {
            if (!value.is_array()) return "a list of integers is expected, such as [4, 4], not " + shown(value);
            std::vector<int64_t> read;
            for (const json& number : value) {
              if (const std::string found = integer_problem(number, least, kAny); !found.empty()) return text("entry ", read.size() + 1, ": ", found);
              read.push_back(number);
            }
            place = read;
            return std::string();
          },
          [&place] { return json(place); }};
}

Field words(std::string key, std::string& place) {
  return checked_words(std::move(key), place, [](const std::string&) { return std::string(); });
}
Field name(std::string key, std::string& place) { return checked_words(std::move(key), place, name_problem); }
Field duration(std::string key, std::string& place) { return checked_words(std::move(key), place, duration_problem); }

double seconds_from(const std::string& duration) {
  double amount = 0.0;
  const char* end = duration.data() + duration.size();
  const auto [rest, code] = std::from_chars(duration.data(), end, amount);
  const std::string unit(rest, end);
  const double scale = unit == "s" ? 1.0 : unit == "min" ? 60.0 : unit == "h" ? 3600.0 : 0.0;
  if (code != std::errc() || scale == 0.0 || !std::isfinite(amount) || amount <= 0.0) {
    fail('"', duration, "\": a duration is a positive number with s, min or h, such as \"90s\" or \"10min\"");
  }
  return amount * scale;
}

}  // namespace upcycle
