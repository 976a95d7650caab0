#pragma once
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "config/run_config.hpp"

namespace upcycle {

/// One key of the run file, bound to its place in one RunConfig. Values travel as JSON, which tells integers, floats,
/// strings and booleans apart; a TOML date, which the run file has no use for, comes as null.
struct Field {
  std::string key;                                         ///< "train.steps"
  std::function<std::string(const nlohmann::json&)> read;  ///< stores a value; what is wrong with it, or ""
  std::function<nlohmann::json()> write;                   ///< the value that is in force
  bool text = false;  ///< a bare word after --set is a string: `--set run.name=2024` needs no quotes

  std::string section() const { return key.substr(0, key.find('.')); }
  std::string name() const { return key.substr(key.find('.') + 1); }
};

/// Every key of the run file, in the order of the page: the one place where a field's name, kind, range and choices are
/// said. The fields point into `config`.
std::vector<Field> describe(RunConfig& config);

/// "10min" -> 600. Throws UserError for anything but a positive number with s, min or h.
double seconds_from(const std::string& duration);

}  // namespace upcycle
