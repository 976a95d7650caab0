#include <algorithm>
#include <cmath>
#include <iomanip>
#include <iostream>

#include "base/error.hpp"
#include "cli/compare.hpp"
#include "cli/inspect_checkpoint.hpp"

namespace upcycle {
namespace {

using nlohmann::json;
using nlohmann::ordered_json;

/// A value in a line: long ones by their size.
std::string in_short(const std::optional<json>& value) {
  constexpr size_t kLongest = 70;
  if (!value) return "absent";
  const std::string all = printable(*value);
  if (all.size() <= kLongest) return all;
  if (value->is_array()) return text(value->size(), " values");
  if (value->is_object()) return text(value->size(), " keys");
  return text(all.substr(0, kLongest - 3), "...");
}

std::string in_short(const Change& change) {
  const std::string before = in_short(change.before), after = in_short(change.after);
  const bool lists = change.before && change.after && change.before->is_array() && change.before->size() == change.after->size();
  if (!lists || before != after) return before + " -> " + after;
  size_t other = 0;
  for (size_t i = 0; i < change.before->size(); ++i) other += (*change.before)[i] != (*change.after)[i];
  return text(other, " of ", before, " differ");
}

void print_changes(const char* title, const std::vector<Change>& changes, const char* none) {
  std::cout << std::left << std::setw(14) << title << (changes.empty() ? none : "") << "\n";
  for (const Change& change : changes) std::cout << "  " << change.key << ": " << in_short(change) << "\n";
}

/// Changed tensors under one name, and how far apart all of them are.
struct Listed {
  std::string name, kinds;
  TensorDistance distance;
  bool same_shape = true;
  int64_t count = 0;
};

std::string kind_of(const StoredTensor& tensor) { return text(word_for(tensor.dtype), ' ', describe(tensor.shape)); }

std::vector<Listed> listed(const FileComparison& file, bool each) {
  std::vector<Listed> out;
  for (const TensorChange& change : file.changed) {
    const std::string before = kind_of(change.before), after = kind_of(change.after);
    const Listed one{each ? change.name : with_stars(change.name), before == after ? before : before + " -> " + after, change.distance,
                     change.same_shape(), 1};
    const auto same = [&](const Listed& l) { return !each && l.name == one.name && l.kinds == one.kinds; };
    const auto found = std::find_if(out.begin(), out.end(), same);
    if (found == out.end()) {
      out.push_back(one);
    } else {
      found->distance.add(one.distance);
      ++found->count;
    }
  }
  return out;
}

std::string in_words(const TensorDistance& d) {
  if (d.differ == 0) return "the values are the same";
  return text("max ", std::setprecision(4), d.max_abs, ", relative L2 ", d.relative_l2(), ", ", d.differ, " of ", d.elements, " differ",
              d.not_finite > 0 ? text(" (", d.not_finite, " of them by no number)") : "");
}

void print_file(const FileComparison& file, bool each) {
  std::cout << "\n" << file.file << ": " << file.equal << (file.equal == 1 ? " tensor is" : " tensors are") << " equal";
  if (!file.changed.empty()) std::cout << ", " << file.changed.size() << (file.changed.size() == 1 ? " differs" : " differ");
  std::cout << "\n";
  for (const std::string& name : file.only_before) std::cout << "  only in the first: " << name << "\n";
  for (const std::string& name : file.only_after) std::cout << "  only in the second: " << name << "\n";
  for (const Listed& l : listed(file, each)) {
    std::cout << "  " << std::left << std::setw(52) << l.name << ' ' << l.kinds << (l.count > 1 ? text("  x ", l.count) : "") << "\n      "
              << (l.same_shape ? in_words(l.distance) : "the shapes differ") << "\n";
  }
}

ordered_json json_of(const std::vector<Change>& changes) {
  ordered_json out = ordered_json::array();
  for (const Change& change : changes) {
    ordered_json entry = {{"key", change.key}};
    if (change.before) entry["first"] = *change.before;
    if (change.after) entry["second"] = *change.after;
    out.push_back(entry);
  }
  return out;
}

ordered_json json_of(const TensorChange& change) {
  const auto kind = [](const StoredTensor& tensor) { return ordered_json{{"dtype", word_for(tensor.dtype)}, {"shape", tensor.shape}}; };
  ordered_json out = {{"first", kind(change.before)}, {"second", kind(change.after)}};
  if (!change.same_shape()) return out;
  const TensorDistance& d = change.distance;
  out["elements"] = d.elements;
  out["differ"] = d.differ;
  out["not_finite"] = d.not_finite;
  out["max_abs"] = d.max_abs;
  out["relative_l2"] = std::isfinite(d.relative_l2()) ? ordered_json(d.relative_l2()) : ordered_json();
  return out;
}

ordered_json json_of(const Comparison& all) {
  ordered_json out = {{"first", all.before},
                      {"second", all.after},
                      {"same", all.same()},
                      {"names", json_of(all.names)},
                      {"layout", json_of(all.layout)},
                      {"training", json_of(all.training)},
                      {"settings", json_of(all.settings)},
                      {"architecture", json_of(all.architecture)},
                      {"provenance", json_of(all.provenance)},
                      {"other_files", all.other_files},
                      {"files_only_in_first", all.only_before},
                      {"files_only_in_second", all.only_after},
                      {"tensors", ordered_json::object()}};
  for (const FileComparison& file : all.files) {
    ordered_json& entry = out["tensors"][file.file] = {{"equal", file.equal}, {"only_in_first", file.only_before},
                                                       {"only_in_second", file.only_after}, {"changed", ordered_json::object()}};
    for (const TensorChange& change : file.changed) entry["changed"][change.name] = json_of(change);
  }
  return out;
}

}  // namespace

void print(const Comparison& all, bool tensors, bool as_json) {
  if (as_json) {
    std::cout << printable(json_of(all), 2) << "\n";
    return;
  }
  std::cout << "first         " << all.before << "\nsecond        " << all.after << "\n";
  for (const auto* told : {&all.names, &all.layout}) {
    for (const Change& change : *told) std::cout << "  " << change.key << ": " << in_short(change) << " (no difference)\n";
  }
  print_changes("training", all.training, "same");
  print_changes("settings", all.settings, "same");
  print_changes("architecture", all.architecture, "same");
  print_changes("provenance", all.provenance, "same");
  for (const std::string& file : all.other_files) std::cout << file << "\n";
  for (const std::string& file : all.only_before) std::cout << "only the first has " << file << "\n";
  for (const std::string& file : all.only_after) std::cout << "only the second has " << file << "\n";
  for (const FileComparison& file : all.files) print_file(file, tensors);
  std::cout << "\n" << (all.same() ? "the same" : "they differ") << "\n";
}

}  // namespace upcycle
