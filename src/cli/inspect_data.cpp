#include "cli/inspect_data.hpp"

#include <algorithm>
#include <cstdio>
#include <iostream>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/error.hpp"
#include "data/summary.hpp"
#include "train/tokenizer.hpp"

namespace upcycle {
namespace {

using nlohmann::ordered_json;

constexpr int64_t kShownDocuments = 3, kShownTokens = 64;

struct Shown {
  int64_t document, length;
  std::vector<int64_t> ids;
  std::optional<std::string> words;
};

std::vector<Shown> first_documents(const IndexedDataset& data, Tokenizer* tokenizer) {
  std::vector<Shown> out;
  for (int64_t document = 0; document < std::min(kShownDocuments, data.documents()); ++document) {
    Shown shown{document, data.length(document), {}, {}};
    shown.ids.resize(static_cast<size_t>(std::min(kShownTokens, shown.length)));
    data.read(document, 0, shown.ids);
    if (tokenizer != nullptr) shown.words = tokenizer->decode(shown.ids);
    out.push_back(std::move(shown));
  }
  return out;
}

std::string range(const LengthBucket& bucket) { return bucket.from == bucket.to ? text(bucket.from) : text(bucket.from, "-", bucket.to); }

void print(const IndexedDataset& data, const DataSummary& summary, const std::vector<Shown>& documents) {
  const auto line = [](const char* key, const std::string& value) { std::printf("%-14s%s\n", key, value.c_str()); };
  const bool all = summary.seen == summary.tokens;
  const std::string of = all ? "" : text(" (of ", summary.seen, " tokens, evenly spread)");
  line("data", data.prefix() + ".bin and .idx");
  line("documents", text(summary.documents, summary.empty > 0 ? text(", ", summary.empty, " of them empty") : ""));
  line("tokens", text(summary.tokens, ", ", data.dtype()));
  line("ids", summary.seen == 0 ? "none" : text(summary.smallest_id, " to ", summary.largest_id, of));
  if (summary.learned) line("learned", text(*summary.learned * 100, " % of the tokens, says ", data.prefix(), ".mask", of));
  std::printf("\ntokens of a document\n");
  for (const auto& [percent, length] : summary.quantiles) std::printf("  %3d %%  %10ld\n", percent, static_cast<long>(length));
  std::printf("\n%21s %12s %15s\n", "length", "documents", "tokens");
  int64_t most = 1;
  for (const LengthBucket& bucket : summary.lengths) most = std::max(most, bucket.documents);
  for (const LengthBucket& bucket : summary.lengths) {
    constexpr double kWidth = 40;
    const double share = static_cast<double>(bucket.documents) / static_cast<double>(most);
    const std::string bar(static_cast<size_t>(kWidth * share + (bucket.documents > 0 ? 0.999 : 0)), '#');
    std::printf("%21s %12ld %15ld  %s\n", range(bucket).c_str(), static_cast<long>(bucket.documents),
                static_cast<long>(bucket.tokens), bar.c_str());
  }
  for (const Shown& shown : documents) {
    std::printf("\ndocument %ld, %zu of %ld tokens\n", static_cast<long>(shown.document), shown.ids.size(), static_cast<long>(shown.length));
    std::printf("  %s\n", shown.words ? nlohmann::json(*shown.words).dump().c_str() : nlohmann::json(shown.ids).dump().c_str());
  }
}

ordered_json to_json(const IndexedDataset& data, const DataSummary& summary, const std::vector<Shown>& documents) {
  ordered_json out = {{"data", data.prefix()},     {"documents", summary.documents}, {"empty_documents", summary.empty},
                      {"tokens", summary.tokens}, {"dtype", data.dtype()},          {"tokens_seen", summary.seen}};
  out["ids"] = summary.seen > 0 ? ordered_json{{"smallest", summary.smallest_id}, {"largest", summary.largest_id}} : ordered_json();
  out["learned"] = summary.learned ? ordered_json(*summary.learned) : ordered_json();
  for (const auto& [percent, length] : summary.quantiles) out["quantiles"].push_back({{"percent", percent}, {"tokens", length}});
  for (const LengthBucket& b : summary.lengths) {
    out["lengths"].push_back({{"from", b.from}, {"to", b.to}, {"documents", b.documents}, {"tokens", b.tokens}});
  }
  for (const Shown& shown : documents) {
    out["first_documents"].push_back({{"document", shown.document}, {"tokens", shown.length}, {"ids", shown.ids},
                                      {"text", shown.words ? ordered_json(*shown.words) : ordered_json()}});
  }
  return out;
}

}  // namespace

void inspect_data(const std::string& prefix, const std::optional<std::string>& tokenizer_directory, bool json) {
  const IndexedDataset data(prefix);
  std::optional<IndexedDataset> mask;
  if (data_prefix(prefix + ".mask")) mask.emplace(prefix + ".mask");
  std::optional<Tokenizer> tokenizer;
  if (tokenizer_directory) tokenizer.emplace(*tokenizer_directory);
  const DataSummary summary = summarise(data, mask ? &*mask : nullptr);
  if (tokenizer && summary.seen > 0 && summary.largest_id >= tokenizer->vocabulary()) {
    fail(prefix, ".bin has id ", summary.largest_id, ", but the tokenizer of ", *tokenizer_directory, " knows ids up to ",
         tokenizer->vocabulary() - 1, ": the data was made with another one");
  }
  const std::vector<Shown> documents = first_documents(data, tokenizer ? &*tokenizer : nullptr);
  if (json) {
    std::cout << to_json(data, summary, documents).dump(2) << std::endl;
  } else {
    print(data, summary, documents);
  }
}

}  // namespace upcycle
