#include <toml++/toml.h>

#include "base/error.hpp"
#include "base/lines.hpp"
#include "config/fields.hpp"
#include "config/run_checks.hpp"
#include "config/suggest.hpp"
#include "config/toml_value.hpp"

// A run file becomes a RunConfig in four passes: TOML, the file's keys, the --set keys, checks of fields against each
// other. Problems are collected, so that the user meets all of them at once.
namespace upcycle {

using nlohmann::json;

namespace {

class Reading {
 public:
  Reading(RunConfig& config, std::string file) : config_(config), file_(std::move(file)), fields_(describe(config)) {
    for (const Field& field : fields_) {
      config.origins[field.key] = "default";
      if (sections_.empty() || sections_.back() != field.section()) sections_.push_back(field.section());
    }
  }

  void read_file(const toml::table& root) {
    for (const auto& [key, node] : root) {
      const std::string section(key.str());
      if (!is_section(section)) {
        add(at(key.source()), "unknown section [", section, "]", hint_for_section(section));
      } else if (const auto* table = node.as_table()) {
        for (const auto& [name, value] : *table) read_entry(section, std::string(name.str()), at(name.source()), value);
        config_.moe_given |= section == "moe";
      } else {
        add(at(key.source()), "[", section, "] is a section, not a key");
      }
    }
  }

  void read_override(const std::string& assignment) {
    const std::string where = "--set " + assignment;
    const size_t equals = assignment.find('=');
    const std::string key = assignment.substr(0, equals);
    if (equals == std::string::npos || key.find('.') == std::string::npos) {
      return add(where, "section.key=value is expected, such as --set train.steps=10");
    }
    const Field* field = find(key);
    if (field == nullptr) return add(where, "unknown key '", key, "'", hint_for_key(key));
    store(*field, override_value(*field, assignment.substr(equals + 1)), where, "--set");
    config_.moe_given |= field->section() == "moe";
  }

  void check() {
    for (const Problem& problem : check_together(config_)) {
      const auto place = places_.find(problem.key);
      add(place == places_.end() ? file_ : place->second, problem.what);
    }
  }

  void finish() const {
    if (problems_.empty()) return;
    if (problems_.size() == 1) throw UserError(problems_.front());
    fail(file_, ": ", problems_.size(), " problems", listed(problems_));
  }

 private:
  template <class... Parts>
  void add(const std::string& where, const Parts&... parts) {
    problems_.push_back(text(where, ": ", parts...));
  }

  std::string at(const toml::source_region& source) const {
    return text(file_, ":", source.begin.line, ":", source.begin.column);
  }

  bool is_section(const std::string& name) const {
    return std::find(sections_.begin(), sections_.end(), name) != sections_.end();
  }

  const Field* find(const std::string& key) const {
    for (const Field& field : fields_) {
      if (field.key == key) return &field;
    }
    return nullptr;
  }

  /// For something that stands where a section should: another section, or a key that lost its section.
  std::string hint_for_section(const std::string& name) const {
    for (const Field& field : fields_) {
      if (field.name() == name) return text("; did you mean '", field.key, "'?");
    }
    return did_you_mean(name, sections_);
  }

  /// The nearest key of the same section; else the same name in another section; else the nearest of all keys.
  std::string hint_for_key(const std::string& key) const {
    const std::string section = key.substr(0, key.find('.')), name = key.substr(key.find('.') + 1);
    std::vector<std::string> near, all;
    std::string elsewhere;
    for (const Field& field : fields_) {
      all.push_back(field.key);
      if (field.section() == section) near.push_back(field.name());
      if (field.name() == name) elsewhere = text("; did you mean '", field.key, "'?");
    }
    if (const std::string best = closest(name, near); !best.empty())
      return text("; did you mean '", section, ".", best, "'?");
    return elsewhere.empty() ? did_you_mean(key, all) : elsewhere;
  }

  void read_entry(const std::string& section, const std::string& name, const std::string& key_place,
                  const toml::node& node) {
    const std::string key = section + "." + name;
    const Field* field = find(key);
    if (field == nullptr) return add(key_place, "unknown key '", key, "'", hint_for_key(key));
    store(*field, to_json_value(node), at(node.source()), text(file_, ":", node.source().begin.line));
  }

  void store(const Field& field, const json& value, const std::string& where, const std::string& origin) {
    if (const std::string problem = field.read(value); !problem.empty()) return add(where, field.key, ": ", problem);
    places_[field.key] = where;
    config_.origins[field.key] = origin;
  }

  /// The right side of --set: TOML where it is TOML, else a bare string, since shells eat quotes.
  static json override_value(const Field& field, const std::string& value) {
    if (field.text && !value.starts_with('"') && !value.starts_with('\'')) return value;
    try {
      const toml::table parsed = toml::parse("value = " + value);
      if (parsed.size() == 1) return to_json_value(*parsed.get("value"));
    } catch (const toml::parse_error&) {  // a bare word
    }
    return value;
  }

  RunConfig& config_;
  std::string file_;
  std::vector<Field> fields_;
  std::vector<std::string> sections_;
  std::map<std::string, std::string> places_;  // where each given value stands, for checks of fields against each other
  std::vector<std::string> problems_;
};

}  // namespace

RunConfig parse_run(const std::string& toml_text, const std::string& name, const std::vector<std::string>& overrides) {
  RunConfig config;
  Reading reading(config, name);
  reading.read_file(parse_toml(toml_text, name));
  for (const std::string& assignment : overrides) reading.read_override(assignment);
  reading.check();
  reading.finish();
  if (config.run.directory.empty()) config.run.directory = "runs/" + config.run.name;
  return config;
}

RunConfig read_run(const std::string& path, const std::vector<std::string>& overrides) {
  return parse_run(toml_text_of(path, "a run file"), path, overrides);
}

}  // namespace upcycle
