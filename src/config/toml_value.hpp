#pragma once
#include <toml++/toml.h>

#include <nlohmann/json_fwd.hpp>
#include <string>

namespace upcycle {

/// The text of a file. Throws UserError saying that `expected`, such as "a run file", is.
std::string toml_text_of(const std::string& path, const char* expected);

/// Throws UserError with the place in the file, which is called `name`, where it is not TOML.
toml::table parse_toml(const std::string& toml_text, const std::string& name);

/// TOML's values as JSON; a date, time or anything else that no key takes becomes null.
nlohmann::json to_json_value(const toml::node& node);

}  // namespace upcycle
