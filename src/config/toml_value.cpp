#include "config/toml_value.hpp"

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "base/error.hpp"

namespace upcycle {

using nlohmann::json;

std::string toml_text_of(const std::string& path, const char* expected) {
  std::ifstream file(path, std::ios::binary);
  if (!file || std::filesystem::is_directory(path)) fail(path, ": cannot be opened; ", expected, " (TOML) is expected");
  std::ostringstream content;
  content << file.rdbuf();
  return content.str();
}

toml::table parse_toml(const std::string& toml_text, const std::string& name) {
  try {
    return toml::parse(toml_text, name);
  } catch (const toml::parse_error& error) {
    fail(name, ":", error.source().begin.line, ":", error.source().begin.column, ": not TOML: ", error.description());
  }
}

json to_json_value(const toml::node& node) {
  if (const auto* value = node.as_string()) return value->get();
  if (const auto* value = node.as_integer()) return value->get();
  if (const auto* value = node.as_floating_point()) return value->get();
  if (const auto* value = node.as_boolean()) return value->get();
  if (const auto* table = node.as_table()) {
    json object = json::object();
    for (const auto& [key, value] : *table) object[std::string(key.str())] = to_json_value(value);
    return object;
  }
  if (const auto* array = node.as_array()) {
    json list = json::array();
    for (const toml::node& value : *array) list.push_back(to_json_value(value));
    return list;
  }
  return nullptr;
}

}  // namespace upcycle
