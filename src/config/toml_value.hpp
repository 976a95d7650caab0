#pragma once
#include <toml++/toml.h>

#include <nlohmann/json_fwd.hpp>

namespace upcycle {

/// TOML's values as JSON; a date, time or anything else that no key takes becomes null.
nlohmann::json to_json_value(const toml::node& node);

}  // namespace upcycle
