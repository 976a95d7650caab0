#include "config/sweep_file.hpp"

#include <toml++/toml.h>

#include <algorithm>
#include <map>
#include <optional>
#include <set>

#include "base/error.hpp"
#include "config/fields.hpp"
#include "config/suggest.hpp"
#include "config/toml_value.hpp"

// [sweep]                       where and how
// [set]                         keys of the run file for all arms: `train.steps = 100`
// [[arms]]                      keys with one value or a list of them; combine = "product" (default) or "zip"
// [[exclude]]                   combinations to leave out: keys with one value each
namespace upcycle {
namespace {

using nlohmann::json;

/// A list of values that one key takes in turn.
struct SweepAxis {
  std::string key;
  std::vector<std::string> values;
};

class SweepReading {
 public:
  explicit SweepReading(std::string name) : name_(std::move(name)), fields_(describe(scratch_)) {}

  SweepFile read(const toml::table& root) {
    SweepFile sweep;
    sweep.path = name_;
    sweep.launcher = {"mpirun", "--oversubscribe", "--bind-to", "none", "--mca", "mpi_yield_when_idle", "1"};
    std::vector<Settings> excluded;
    for (const auto& [key, node] : root) {
      const std::string section(key.str());
      if (section == "sweep" && node.is_table()) {
        read_sweep_section(sweep, *node.as_table());
      } else if (section == "set" && node.is_table()) {
        for (const SweepAxis& axis : axes_of(*node.as_table())) sweep.common.emplace_back(axis.key, only_value(axis, *node.as_table(), "[set]"));
      } else if (section == "arms" && node.is_array_of_tables()) {
        for (const toml::node& arms : *node.as_array()) append(sweep.arms, expanded(*arms.as_table()));
      } else if (section == "exclude" && node.is_array_of_tables()) {
        for (const toml::node& one : *node.as_array()) excluded.push_back(settings_of(*one.as_table()));
      } else {
        refuse(node, "'", section, "': a sweep file has [sweep], [set], [[arms]] and [[exclude]]", did_you_mean(section, {"sweep", "set", "arms", "exclude"}));
      }
    }
    check(sweep, excluded);
    return sweep;
  }

 private:
  template <class... Parts>
  [[noreturn]] void refuse(const toml::node& node, const Parts&... parts) const {
    fail(name_, ":", node.source().begin.line, ":", node.source().begin.column, ": ", parts...);
  }

  void read_sweep_section(SweepFile& sweep, const toml::table& table) {
    const auto text_of = [&](const toml::node& node) { return node.is_string() ? node.as_string()->get() : (refuse(node, "a text in quotes is expected"), ""); };
    const auto count_of = [&](const toml::node& node) -> int64_t {
      if (!node.is_integer() || node.as_integer()->get() < 1 || node.as_integer()->get() > 1 << 20) refuse(node, "a number from 1 on is expected");
      return node.as_integer()->get();
    };
    const auto flag_of = [&](const toml::node& node) { return node.is_boolean() ? node.as_boolean()->get() : (refuse(node, "true or false is expected"), false); };
    const std::map<std::string, std::function<void(const toml::node&)>> keys = {
        {"base", [&](const toml::node& node) { sweep.base = text_of(node); }},
        {"directory", [&](const toml::node& node) { sweep.directory = text_of(node); }},
        {"match", [&](const toml::node& node) { sweep.match = match_of(node, text_of(node)); }},
        {"control", [&](const toml::node& node) { sweep.control = flag_of(node); }},
        {"same_batches", [&](const toml::node& node) { sweep.same_batches = flag_of(node); }},
        {"seeds", [&](const toml::node& node) { sweep.seeds = seeds_of(node); }},
        {"ranks", [&](const toml::node& node) { sweep.ranks = count_of(node); }},
        {"at_once", [&](const toml::node& node) { sweep.at_once = count_of(node); }},
        {"launcher", [&](const toml::node& node) { sweep.launcher = words_of(text_of(node)); }},
        {"prepare", [&](const toml::node& node) { sweep.prepare = text_of(node); }},
        {"calibration_steps", [&](const toml::node& node) { sweep.calibration_steps = count_of(node); }},
        {"teraflops", [&](const toml::node& node) {
           const auto number = node.value<double>();
           if (!node.is_number() || *number <= 0) refuse(node, "a number above 0 is expected");
           sweep.teraflops = *number;
         }}};
    std::vector<std::string> names;
    for (const auto& [key, read] : keys) names.push_back(key);
    for (const auto& [key, node] : table) {
      const auto found = keys.find(std::string(key.str()));
      if (found == keys.end()) refuse(node, "unknown key 'sweep.", key.str(), "'", did_you_mean(std::string(key.str()), names));
      found->second(node);
    }
  }

  Match match_of(const toml::node& node, const std::string& word) const {
    if (word == "tokens") return Match::tokens;
    if (word == "flops") return Match::flops;
    if (word == "time") return Match::time;
    refuse(node, "sweep.match is \"tokens\", \"flops\" or \"time\"", did_you_mean(word, {"tokens", "flops", "time"}));
  }

  std::vector<int64_t> seeds_of(const toml::node& node) const {
    std::vector<int64_t> seeds;
    if (const auto* list = node.as_array()) {
      for (const toml::node& seed : *list) {
        if (!seed.is_integer() || seed.as_integer()->get() < 0) refuse(seed, "sweep.seeds: numbers from 0 on are expected");
        if (std::find(seeds.begin(), seeds.end(), seed.as_integer()->get()) != seeds.end()) refuse(seed, "sweep.seeds names ", seed.as_integer()->get(), " twice");
        seeds.push_back(seed.as_integer()->get());
      }
    }
    if (seeds.empty()) refuse(node, "sweep.seeds: a list of numbers is expected, such as [1, 2]");
    return seeds;
  }

  static std::vector<std::string> words_of(const std::string& line) {
    std::istringstream in(line);
    return {std::istream_iterator<std::string>(in), {}};
  }

  // The field itself says what one value of it is, and so what is a list of values.
  SweepAxis axis_of(const std::string& key, const toml::node& node) {
    static const std::set<std::string> kOurs = {"run.directory", "run.name", "run.seed", "data.seed"};
    const auto field = std::find_if(fields_.begin(), fields_.end(), [&](const Field& f) { return f.key == key; });
    if (field == fields_.end()) {
      std::vector<std::string> all;
      for (const Field& each : fields_) all.push_back(each.key);
      refuse(node, "unknown key '", key, "'", did_you_mean(key, all));
    }
    if (kOurs.contains(key)) refuse(node, key, " is set by the sweep itself (sweep.directory, sweep.seeds, sweep.same_batches)");
    const json value = to_json_value(node);
    const std::string problem = field->read(value);
    if (problem.empty()) return {key, {value.dump()}};
    if (!node.is_array()) refuse(node, key, ": ", problem);
    SweepAxis axis{key, {}};
    for (const json& one : value) {
      if (const std::string bad = field->read(one); !bad.empty()) refuse(node, key, ": ", bad);
      axis.values.push_back(one.dump());
    }
    if (axis.values.empty()) refuse(node, key, " = []: a list of values has at least one");
    return axis;
  }

  /// Dotted keys (`moe.experts = 8`) are tables in TOML.
  std::vector<SweepAxis> axes_of(const toml::table& table) {
    std::vector<SweepAxis> axes;
    std::vector<std::pair<std::string, const toml::node*>> keys;
    for (const auto& [section, entry] : table) {
      if (section.str() == "combine") continue;
      if (!entry.is_table()) refuse(entry, "'", section.str(), "': keys have a section here, such as moe.experts");
      for (const auto& [name, node] : *entry.as_table()) keys.emplace_back(text(section.str(), ".", name.str()), &node);
    }
    const auto line = [](const auto& key) { return std::pair(key.second->source().begin.line, key.second->source().begin.column); };
    std::sort(keys.begin(), keys.end(), [&](const auto& a, const auto& b) { return line(a) < line(b); });
    for (const auto& [key, node] : keys) axes.push_back(axis_of(key, *node));
    return axes;
  }

  std::string only_value(const SweepAxis& axis, const toml::table& table, const char* where) const {
    if (axis.values.size() != 1) refuse(table, where, " has one value a key, but ", axis.values.size(), " of ", axis.key);
    return axis.values.front();
  }

  Settings settings_of(const toml::table& table) {
    Settings out;
    for (const SweepAxis& axis : axes_of(table)) out.emplace_back(axis.key, only_value(axis, table, "[[exclude]]"));
    if (out.empty()) refuse(table, "[[exclude]] without a key would leave out every arm");
    return out;
  }

  std::vector<Settings> expanded(const toml::table& table) {
    const std::vector<SweepAxis> axes = axes_of(table);
    std::string combine = "product";
    if (const toml::node* node = table.get("combine")) {
      combine = node->value_or(std::string());
      if (combine != "product" && combine != "zip") refuse(*node, "combine is \"product\" or \"zip\"");
    }
    if (axes.empty()) refuse(table, "[[arms]] without a key: name at least one, such as moe.experts = [4, 8]");
    if (combine == "zip") return zipped(axes, table);
    std::vector<Settings> out = {{}};
    for (const SweepAxis& axis : axes) {   // the last key runs fastest
      std::vector<Settings> longer;
      for (const Settings& begun : out) {
        for (const std::string& value : axis.values) {
          longer.push_back(begun);
          longer.back().emplace_back(axis.key, value);
        }
      }
      out = std::move(longer);
    }
    return out;
  }

  std::vector<Settings> zipped(const std::vector<SweepAxis>& axes, const toml::table& table) const {
    size_t length = 1;
    for (const SweepAxis& axis : axes) {
      if (axis.values.size() > 1 && length > 1 && axis.values.size() != length) {
        refuse(table, "combine = \"zip\" walks lists of one length together, but ", axis.key, " has ", axis.values.size(), " values and another key ", length);
      }
      length = std::max(length, axis.values.size());
    }
    std::vector<Settings> out(length);
    for (size_t i = 0; i < length; ++i) {
      for (const SweepAxis& axis : axes) out[i].emplace_back(axis.key, axis.values[axis.values.size() == 1 ? 0 : i]);
    }
    return out;
  }

  static void append(std::vector<Settings>& all, std::vector<Settings> more) { all.insert(all.end(), more.begin(), more.end()); }

  void check(SweepFile& sweep, const std::vector<Settings>& excluded) const {
    if (sweep.base.empty()) fail(name_, ": sweep.base is missing: the run file that all arms start from");
    if (sweep.directory.empty()) fail(name_, ": sweep.directory is missing: every arm's run goes there");
    if (sweep.launcher.empty()) fail(name_, ": sweep.launcher is empty: leave it out for mpirun");
    const size_t before = sweep.arms.size();
    std::erase_if(sweep.arms, [&](const Settings& arm) {
      return std::any_of(excluded.begin(), excluded.end(), [&](const Settings& pattern) {
        return std::all_of(pattern.begin(), pattern.end(), [&](const auto& key) { return std::find(arm.begin(), arm.end(), key) != arm.end(); });
      });
    });
    if (sweep.arms.empty()) {
      fail(name_, ": no arm is left", before == 0 ? ": write [[arms]] with at least one key" : text(": [[exclude]] leaves out all ", before));
    }
    std::set<std::set<std::pair<std::string, std::string>>> seen;
    for (const Settings& arm : sweep.arms) {
      if (seen.emplace(arm.begin(), arm.end()).second) continue;
      std::string line;
      for (const auto& [key, value] : arm) line += text(line.empty() ? "" : ", ", key, " = ", value);
      fail(name_, ": two arms have the same settings: ", line);
    }
    for (const auto& [key, value] : sweep.common) {
      for (const Settings& arm : sweep.arms) {
        if (std::any_of(arm.begin(), arm.end(), [&](const auto& setting) { return setting.first == key; })) {
          fail(name_, ": ", key, " is in [set], for all arms, and in [[arms]]: keep one");
        }
      }
    }
  }

  std::string name_;
  RunConfig scratch_;
  std::vector<Field> fields_;
};

}  // namespace

SweepFile parse_sweep(const std::string& toml_text, const std::string& name) {
  return SweepReading(name).read(parse_toml(toml_text, name));
}

SweepFile read_sweep(const std::string& path) {
  return parse_sweep(toml_text_of(path, "a sweep file"), path);
}

}  // namespace upcycle
