#include "upcycle/certificate.hpp"

#include <cmath>
#include <cstdio>

#include "base/dtype.hpp"
#include "base/error.hpp"

namespace upcycle {

using nlohmann::json;

namespace {

bool overlap(const Box& a, const Box& b) {
  for (size_t d = 0; d < a.begin.size(); ++d) {
    if (a.begin[d] + a.size[d] <= b.begin[d] || b.begin[d] + b.size[d] <= a.begin[d]) return false;
  }
  return true;
}

/// Values of `spec` that were compared, replicas once; -1 when boxes overlap without being equal.
int64_t values_covered(const std::vector<Box>& boxes) {
  int64_t values = 0;
  for (size_t i = 0; i < boxes.size(); ++i) {
    bool replica = false;
    for (size_t j = 0; j < i && !replica; ++j) {
      replica = boxes[i] == boxes[j];
      if (!replica && overlap(boxes[i], boxes[j])) return -1;
    }
    if (!replica) values += elements(boxes[i]);
  }
  return values;
}

std::string scientific(double x) {
  char out[32];
  std::snprintf(out, sizeof out, "%.2e", x);
  return out;
}
std::string fixed(double x, int digits) {
  char out[48];
  std::snprintf(out, sizeof out, "%.*f", digits, x);
  return out;
}
std::string percent(double share) { return fixed(100 * share, share > 0 && share < 0.001 ? 3 : 1) + " %"; }

double share(int64_t part, int64_t of) { return of == 0 ? 0.0 : static_cast<double>(part) / static_cast<double>(of); }
double mean(double sum, int64_t count) { return count == 0 ? 0.0 : sum / static_cast<double>(count); }

bool finite(const FunctionLevel& f) {
  return std::isfinite(f.worst_layer()) && std::isfinite(f.logits.relative_l2()) && std::isfinite(f.logits.max_abs) &&
         std::isfinite(f.divergence) && std::isfinite(f.dense_loss) && std::isfinite(f.moe_loss);
}

// Evidence as it travels between ranks. NaN has no JSON form: it travels as null.
json raw(double x) { return std::isfinite(x) ? json(x) : json(); }
double number(const json& x) { return x.is_null() ? std::nan("") : x.get<double>(); }
json raw(const Difference& d) { return {raw(d.difference2), raw(d.reference2), raw(d.max_abs)}; }
Difference difference(const json& x) { return {number(x[0]), number(x[1]), number(x[2])}; }

json raw(const FunctionLevel& f) {
  json layers = json::array();
  for (const auto& [layer, d] : f.layers) layers.push_back({layer, raw(d)});
  const RoutingCount& r = f.routing;
  return {{"precision", f.precision}, {"layers", layers}, {"logits", raw(f.logits)}, {"tokens", f.tokens},
          {"routing", {r.pairs, r.near_ties, r.bf16_ties, r.complete}},
          {"sums", {raw(f.divergence), raw(f.dense_loss), raw(f.moe_loss)}}};
}

FunctionLevel function_level(const json& x) {
  FunctionLevel f;
  f.precision = x["precision"];
  for (const json& layer : x["layers"]) f.layers[layer[0]] = difference(layer[1]);
  f.logits = difference(x["logits"]);
  f.tokens = x["tokens"];
  f.routing = {x["routing"][0], x["routing"][1], x["routing"][2], x["routing"][3]};
  f.divergence = number(x["sums"][0]), f.dense_loss = number(x["sums"][1]), f.moe_loss = number(x["sums"][2]);
  return f;
}

json raw(const WeightLevel& w) {
  json covered = json::object();
  for (const auto& [name, boxes] : w.covered) {
    for (const Box& box : boxes) covered[name].push_back({box.begin, box.size});
  }
  return {{"counts", {w.comparisons, w.mismatches, w.altered}}, {"first_mismatch", w.first_mismatch}, {"covered", covered}};
}

WeightLevel weight_level(const json& x) {
  WeightLevel w;
  w.comparisons = x["counts"][0], w.mismatches = x["counts"][1], w.altered = x["counts"][2];
  w.first_mismatch = x["first_mismatch"];
  for (const auto& [name, boxes] : x["covered"].items()) {
    for (const json& box : boxes) w.covered[name].push_back({box[0].get<Shape>(), box[1].get<Shape>()});
  }
  return w;
}

json report(const FunctionLevel& f) {
  json layers = json::array();
  for (const auto& [layer, d] : f.layers) {
    layers.push_back({{"layer", layer}, {"relative_l2", raw(d.relative_l2())}, {"max_abs", raw(d.max_abs)}});
  }
  const double dense = mean(f.dense_loss, f.tokens), moe = mean(f.moe_loss, f.tokens);
  return {{"precision", f.precision}, {"tokens", f.tokens}, {"feed_forwards", layers},
          {"logits", {{"relative_l2", raw(f.logits.relative_l2())}, {"max_abs", raw(f.logits.max_abs)}}},
          {"kl", raw(mean(f.divergence, f.tokens))},
          {"loss", {{"dense", raw(dense)}, {"moe", raw(moe)}, {"difference", raw(moe - dense)}}},
          {"routing", {{"pairs", f.routing.pairs}, {"near_ties", share(f.routing.near_ties, f.routing.pairs)},
                       {"ties_in_bf16", share(f.routing.bf16_ties, f.routing.pairs)},
                       {"complete_copies", share(f.routing.complete, f.routing.pairs)}}}};
}

}  // namespace

std::string Certificate::pack() const {
  json out = {{"weights", raw(weights)}, {"functions", json::array()}};
  for (const FunctionLevel& f : functions) out["functions"].push_back(raw(f));
  return out.dump();
}

void Certificate::merge(const std::string& packed) {
  const json other = json::parse(packed);
  weights.merge(weight_level(other["weights"]));
  if (other["functions"].size() != functions.size()) throw std::logic_error("ranks judged different precisions");
  for (size_t i = 0; i < functions.size(); ++i) functions[i].merge(function_level(other["functions"][i]));
}

std::vector<std::string> Certificate::objections() const {
  std::vector<std::string> out;
  if (weights.mismatches > 0) out.push_back(text(weights.mismatches, " of ", weights.comparisons, " weights are wrong, first ", weights.first_mismatch));
  for (const ParameterSpec& spec : catalogue(recipe_.moe)) {
    const auto found = weights.covered.find(spec.name);
    const int64_t values = found == weights.covered.end() ? 0 : values_covered(found->second);
    if (values == elements(spec.shape)) continue;
    out.push_back(values < 0 ? text(spec.name, ": parts overlap") : text(spec.name, ": ", values, " of ", elements(spec.shape), " values are there"));
  }
  for (const FunctionLevel& f : functions) {
    if (!finite(f)) out.push_back(f.precision + ": values are not finite");
    if (recipe_.exactness() != Exactness::exact || f.precision != long_name(at::kFloat)) continue;
    const auto demand = [&](double relative, const std::string& what) {
      if (relative > kExactTolerance) out.push_back(text(what, " differ by ", scientific(relative), " (relative L2, fp32); exact means at most ", scientific(kExactTolerance)));
    };
    demand(f.logits.relative_l2(), "logits");
    demand(f.worst_layer(), "feed-forwards");
  }
  return out;
}

json Certificate::to_json() const {
  const std::vector<std::string> against = objections();
  int64_t values = 0;
  for (const auto& [name, boxes] : weights.covered) values += std::max<int64_t>(0, values_covered(boxes));
  json out = {{"verdict", against.empty() ? "passed" : "failed"}, {"objections", against}, {"expected", name(recipe_.exactness())},
              {"tolerance", kExactTolerance}, {"recipe", upcycle::to_json(recipe_)},
              {"weights", {{"tensors", weights.covered.size()}, {"values", values}, {"mismatches", weights.mismatches},
                           {"altered", weights.altered}, {"first_mismatch", weights.first_mismatch}}},
              {"functions", json::array()}};
  for (const FunctionLevel& f : functions) out["functions"].push_back(report(f));
  return out;
}

std::string Certificate::table() const {
  const json all = to_json();
  const Recipe& r = recipe_;
  const std::string from = r.of_mixture() ? "source" : r.quotas.empty() ? "dense" : "mean";   // of several, the model of means
  std::string out = text("certificate: ", r.moe.experts, " experts = ", r.copies, " copies x ",
                         r.of_mixture() ? text(r.source.experts, " experts") : text(r.granularity, " shards"), ", top-", r.moe.top_k,
                         r.quotas.empty() ? "" : text(", of ", r.quotas.size(), " sources").c_str(),
                         r.permutation == UnitOrder::random ? ", hidden units in a random order for each copy" : "",
                         r.permutation == UnitOrder::clusters ? ", hidden units in clusters" : "",
                         ", expected ", name(r.exactness()), r.lossless() ? ", lossless\n" : "\n");
  const auto row = [&](const std::string& what, auto value) {
    std::string line = "  " + what;
    line.resize(std::max<size_t>(46, line.size() + 1), ' ');
    for (const FunctionLevel& f : functions) {
      std::string cell = value(f);
      cell.insert(0, cell.size() < 14 ? 14 - cell.size() : 1, ' ');
      line += cell;
    }
    out += line + "\n";
  };
  out += text("  weights: ", weights.covered.size(), " tensors, ", all["weights"]["values"].get<int64_t>(), " values, ", weights.mismatches, " wrong",
              weights.altered ? text(", ", weights.altered, " altered by noise or drop") : "", "\n");
  if (!functions.empty()) {
    row(from + " against mixture", [](const FunctionLevel& f) { return f.precision; });
    row("feed-forwards, worst layer, relative L2", [](const FunctionLevel& f) { return scientific(f.worst_layer()); });
    row("logits, relative L2", [](const FunctionLevel& f) { return scientific(f.logits.relative_l2()); });
    row("logits, largest difference", [](const FunctionLevel& f) { return scientific(f.logits.max_abs); });
    row("KL(" + from + " || mixture), nats/token", [](const FunctionLevel& f) { return scientific(mean(f.divergence, f.tokens)); });
    row("loss, " + from, [](const FunctionLevel& f) { return fixed(mean(f.dense_loss, f.tokens), 5); });
    row("loss, mixture", [](const FunctionLevel& f) { return fixed(mean(f.moe_loss, f.tokens), 5); });
    row("loss, difference", [](const FunctionLevel& f) { return scientific(mean(f.moe_loss - f.dense_loss, f.tokens)); });
    row(r.of_mixture() ? "all copies of an expert chosen" : "whole copies chosen", [](const FunctionLevel& f) { return percent(share(f.routing.complete, f.routing.pairs)); });
    row("copies nearly tied at the top-k boundary", [](const FunctionLevel& f) { return percent(share(f.routing.near_ties, f.routing.pairs)); });
    row("the same, had the logits been bf16", [](const FunctionLevel& f) { return percent(share(f.routing.bf16_ties, f.routing.pairs)); });
    if (r.exactness() != Exactness::exact) {
      const FunctionLevel& f = functions.front();
      out += text("  this recipe misses the " + from + " function by ", percent(f.logits.relative_l2()), " of the logits, ", percent(f.worst_layer()),
                  " of the worst feed-forward (relative L2, ", f.precision, ")\n");
    } else if (r.tied() > 1 && functions.front().routing.bf16_ties > 0) {
      out += "  inference with router logits in bf16 (transformers) may choose parts of tied copies; in fp32 it does not\n";
    }
  }
  const std::vector<std::string> against = objections();
  for (const std::string& line : against) out += "  against it: " + line + "\n";
  return out + "  verdict: " + (against.empty() ? "passed" : "FAILED");
}

}  // namespace upcycle
