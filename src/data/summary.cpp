#include "data/summary.hpp"

#include <algorithm>
#include <bit>
#include <filesystem>
#include <limits>
#include <map>

#include "base/error.hpp"

namespace upcycle {
namespace {

void refuse_other_documents(const IndexedDataset& data, const IndexedDataset& mask) {
  if (mask.documents() != data.documents()) {
    fail(mask.prefix(), ".idx: ", mask.documents(), " documents, but ", data.prefix(), ".idx has ", data.documents(),
         ": it is the mask of other data");
  }
  for (int64_t document = 0; document < data.documents(); ++document) {
    if (mask.length(document) == data.length(document)) continue;
    fail(mask.prefix(), ".idx: document ", document, " has ", mask.length(document), " tokens, but ", data.length(document), " in ",
         data.prefix(), ".idx: it is the mask of other data");
  }
}

// The last document that begins at or before `token`.
int64_t document_of(const IndexedDataset& data, int64_t token) {
  int64_t document = 0;
  for (int64_t above = data.documents(); above - document > 1;) {
    const int64_t middle = document + (above - document) / 2;
    (data.offset(middle) <= token ? document : above) = middle;
  }
  return document;
}

// visit(ids) for tokens [begin, end), counted over all documents.
template <class Visit>
void read(const IndexedDataset& data, int64_t begin, int64_t end, std::vector<int64_t>& ids, const Visit& visit) {
  for (int64_t document = document_of(data, begin); begin < end; ++document) {
    const int64_t first = begin - data.offset(document), count = std::min(end - begin, data.length(document) - first);
    if (count <= 0) continue;
    ids.resize(static_cast<size_t>(count));
    data.read(document, first, ids);
    visit(ids);
    begin += count;
  }
}

// Of `tokens`, pieces [begin, end) that together have `most`, spread from the first to the last.
std::vector<std::pair<int64_t, int64_t>> pieces(int64_t tokens, int64_t most) {
  if (tokens <= most) return {{0, tokens}};
  const int64_t count = std::max<int64_t>(2, std::min<int64_t>(1024, most / 1024)), size = most / count;
  std::vector<std::pair<int64_t, int64_t>> out;
  for (int64_t i = 0; i < count; ++i) {
    const auto begin = static_cast<int64_t>(static_cast<double>(tokens - size) * static_cast<double>(i) / static_cast<double>(count - 1));
    out.emplace_back(begin, begin + size);
  }
  return out;
}

}  // namespace

DataSummary summarise(const IndexedDataset& data, const IndexedDataset* mask, int64_t most) {
  if (mask != nullptr) refuse_other_documents(data, *mask);
  DataSummary out;
  out.documents = data.documents();
  out.tokens = data.tokens();
  std::map<int64_t, int64_t> count;   // by length; n different lengths take n(n-1)/2 tokens
  for (int64_t document = 0; document < data.documents(); ++document) ++count[data.length(document)];
  out.empty = count.contains(0) ? count[0] : 0;
  for (const auto& [length, documents] : count) {
    const auto bits = std::bit_width(static_cast<uint64_t>(length));   // 0: 0, 1: 1, 2 and 3: 2, ...
    while (out.lengths.empty() || out.lengths.back().to < length) {
      const bool first = out.lengths.empty();
      const int bucket = first ? bits : std::bit_width(static_cast<uint64_t>(out.lengths.back().to)) + 1;
      out.lengths.push_back({bucket == 0 ? 0 : int64_t{1} << (bucket - 1), bucket == 0 ? 0 : (int64_t{1} << bucket) - 1});
    }
    out.lengths.back().documents += documents;
    out.lengths.back().tokens += documents * length;
  }
  for (const int percent : {0, 5, 25, 50, 75, 95, 99, 100}) {
    if (out.documents == 0) break;
    // The smallest length that this share of the documents does not exceed.
    const int64_t rank = std::max<int64_t>(1, (out.documents * percent + 99) / 100);
    int64_t below = 0;
    for (const auto& [length, documents] : count) {
      if ((below += documents) < rank) continue;
      out.quantiles.emplace_back(percent, length);
      break;
    }
  }

  std::vector<int64_t> ids;
  int64_t smallest = std::numeric_limits<int64_t>::max(), largest = std::numeric_limits<int64_t>::min(), learned = 0;
  for (const auto& [begin, end] : pieces(data.tokens(), most)) {
    read(data, begin, end, ids, [&](const std::vector<int64_t>& some) {
      const auto [low, high] = std::minmax_element(some.begin(), some.end());
      smallest = std::min(smallest, *low), largest = std::max(largest, *high);
    });
    if (mask != nullptr) {
      read(*mask, begin, end, ids, [&](const std::vector<int64_t>& some) {
        learned += static_cast<int64_t>(some.size()) - std::count(some.begin(), some.end(), 0);
      });
    }
    out.seen += end - begin;
  }
  if (out.seen == 0) return out;
  out.smallest_id = smallest, out.largest_id = largest;
  if (mask != nullptr) out.learned = static_cast<double>(learned) / static_cast<double>(out.seen);
  return out;
}

std::optional<std::string> data_prefix(const std::string& path) {
  const auto exists = [](const std::string& prefix) { return std::filesystem::is_regular_file(prefix + ".idx"); };
  if (exists(path)) return path;
  for (const char* ending : {".idx", ".bin"}) {
    if (path.ends_with(ending) && exists(path.substr(0, path.size() - 4))) return path.substr(0, path.size() - 4);
  }
  return std::nullopt;
}

}  // namespace upcycle
