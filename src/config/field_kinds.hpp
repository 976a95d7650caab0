#pragma once
#include <array>
#include <limits>
#include <optional>
#include <stdexcept>
#include <utility>

#include "base/error.hpp"
#include "config/fields.hpp"
#include "config/suggest.hpp"

/// The kinds of keys that a run file has: how each is read, judged by itself and written. `place` is where the value
/// lives.
namespace upcycle {

inline constexpr int64_t kAny = std::numeric_limits<int64_t>::max();

/// An interval of floats; open at its lower or upper end where it says so.
struct Range {
  double least = 0.0;
  double most = std::numeric_limits<double>::infinity();
  bool above = false;  ///< least itself is outside
  bool below = false;  ///< most itself is outside
};
inline constexpr Range kNotNegative{};
inline constexpr Range kPositive{.above = true};
inline constexpr Range kShare{.most = 1.0};
inline constexpr Range kDecay{.most = 1.0, .below = true};

/// "the float 0.5", "the string \"x\"", "a list".
std::string shown(const nlohmann::json& value);
/// What is wrong with a value, or "".
std::string integer_problem(const nlohmann::json& value, int64_t least, int64_t most);
std::string number_problem(const nlohmann::json& value, const Range& range);

Field integer(std::string key, int64_t& place, int64_t least, int64_t most = kAny);
/// An integer whose default follows from other fields.
Field integer(std::string key, std::optional<int64_t>& place, int64_t least, std::function<int64_t()> in_force);
Field number(std::string key, double& place, Range range);
/// A number whose default follows from other fields.
Field number(std::string key, std::optional<double>& place, Range range, std::function<double()> in_force);
Field flag(std::string key, bool& place);
/// Any text.
Field words(std::string key, std::string& place);
/// ["a", "b"]: texts that are not empty; [] for none.
Field word_list(std::string key, std::vector<std::string>& place);
/// [4, 4]: integers of at least `least`; [] for none.
Field integer_list(std::string key, std::vector<int64_t>& place, int64_t least);
/// A name that a directory can have.
Field name(std::string key, std::string& place);
/// A duration, see seconds_from.
Field duration(std::string key, std::string& place);
/// "mock" or [[weight, prefix], ...].
Field blend(std::string key, std::vector<Blend>& place);
/// The layer policy of [moe].
Field layers(std::string key, std::string& place);
/// "3|4|4|3", numbers of layers; empty for none.
Field layer_counts(std::string key, std::vector<int64_t>& place);

template <class T>
using Choices = std::vector<std::pair<std::string, T>>;

template <class T>
Field choice(std::string key, T& place, Choices<T> choices) {
  auto read = [&place, choices](const nlohmann::json& value) {
    std::vector<std::string> names;
    std::string list;
    for (const auto& [name, meaning] : choices) {
      if (value == name) {
        place = meaning;
        return std::string();
      }
      list += (names.empty() ? "\"" : name == choices.back().first ? " or \"" : ", \"") + name + "\"";
      names.push_back(name);
    }
    const std::string hint = value.is_string() ? did_you_mean(value.get<std::string>(), names) : "";
    return "choose " + list + ", not " + shown(value) + hint;
  };
  auto write = [&place, choices] {
    for (const auto& [name, meaning] : choices) {
      if (place == meaning) return nlohmann::json(name);
    }
    throw std::logic_error("a choice without a name");
  };
  return {std::move(key), read, write, true};
}

/// One of some words, kept as the word.
Field choice(std::string key, std::string& place, const std::vector<std::string>& names);

/// A list of exactly Count numbers, each judged by `problem`.
template <class T, size_t Count, class Problem>
Field fixed_list(std::string key, std::array<T, Count>& place, Problem problem) {
  return {std::move(key),
          [&place, problem](const nlohmann::json& value) {
            if (!value.is_array() || value.size() != Count) {
              return text("a list of ", Count, " numbers is expected, not ",
                          value.is_array() ? value.dump() : shown(value));
            }
            std::array<T, Count> read{};
            for (size_t i = 0; i < Count; ++i) {
              if (const std::string found = problem(value[i]); !found.empty())
                return text("entry ", i + 1, ": ", found);
              read[i] = value[i].template get<T>();
            }
            place = read;
            return std::string();
          },
          [&place] { return nlohmann::json(place); }};
}

}  // namespace upcycle
