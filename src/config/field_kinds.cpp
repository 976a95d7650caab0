// The kinds of keys that hold one value. Those that hold several: field_lists.cpp.
#include "config/field_kinds.hpp"

#include <charconv>
#include <cmath>

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

std::string number_problem(const json& value, const Range& range) {
  if (!value.is_number() || !std::isfinite(value.get<double>())) return "a number is expected, not " + shown(value);
  const double number = value;
  if (range.above && number <= range.least) return text(value.dump(), " must be more than ", range.least);
  if (number < range.least) return text(value.dump(), " is less than ", range.least);
  if (range.below && number >= range.most) return text(value.dump(), " must be less than ", range.most);
  if (number > range.most) return text(value.dump(), " is more than ", range.most);
  return "";
}

namespace {

/// Reads a T into `place`, a T or an optional one, where `problem` finds nothing wrong.
template <class T, class Place, class Problem>
auto reads(Place& place, Problem problem) {
  return [&place, problem](const json& value) {
    const std::string found = problem(value);
    if (found.empty()) place = value.get<T>();
    return found;
  };
}
auto between(int64_t least, int64_t most) {
  return [least, most](const json& value) { return integer_problem(value, least, most); };
}
auto within(const Range& range) {
  return [range](const json& value) { return number_problem(value, range); };
}

}  // namespace

Field integer(std::string key, int64_t& place, int64_t least, int64_t most) {
  return {std::move(key), reads<int64_t>(place, between(least, most)), [&place] { return json(place); }};
}
Field integer(std::string key, std::optional<int64_t>& place, int64_t least, std::function<int64_t()> in_force) {
  return {std::move(key), reads<int64_t>(place, between(least, kAny)), [in_force] { return json(in_force()); }};
}
Field number(std::string key, double& place, Range range) {
  return {std::move(key), reads<double>(place, within(range)), [&place] { return json(place); }};
}
Field number(std::string key, std::optional<double>& place, Range range, std::function<double()> in_force) {
  return {std::move(key), reads<double>(place, within(range)), [in_force] { return json(in_force()); }};
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

Field words(std::string key, std::string& place) {
  return checked_words(std::move(key), place, [](const std::string&) { return std::string(); });
}
Field name(std::string key, std::string& place) { return checked_words(std::move(key), place, name_problem); }
Field duration(std::string key, std::string& place) { return checked_words(std::move(key), place, duration_problem); }

Field choice(std::string key, std::string& place, const std::vector<std::string>& names) {
  Choices<std::string> choices;
  for (const std::string& name : names) choices.emplace_back(name, name);
  return choice(std::move(key), place, choices);
}

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
