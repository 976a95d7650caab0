#include "data/loss_mask.hpp"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <string>

#include "base/error.hpp"

namespace upcycle {
namespace {

constexpr int kUint8 = 1;
constexpr std::byte kLearned{1};

void check_documents(const IndexedDataset& data, const IndexedDataset& mask) {
  const std::string file = mask.prefix() + ".idx";
  const auto differs = [&](const auto&... parts) {
    fail(file, ": ", parts..., ": the mask is not of these tokens; write both anew");
  };
  const int64_t common = std::min(data.documents(), mask.documents());
  for (int64_t document = 0; document < common; ++document) {
    if (data.length(document) == mask.length(document)) continue;
    differs("document ", document, " has ", mask.length(document), " tokens, but ", data.length(document), " in ", data.prefix(), ".idx");
  }
  if (data.documents() != mask.documents()) {
    differs(mask.documents(), " documents, but ", data.documents(), " in ", data.prefix(), ".idx; document ", common, " is the first that ",
            data.documents() > common ? "the mask lacks" : "only the mask has");
  }
}

}  // namespace

std::optional<LossMask> LossMask::beside(const IndexedDataset& data) {
  const std::string prefix = data.prefix() + ".mask";
  if (!std::filesystem::exists(prefix + ".idx")) {
    // Training on what was meant to be only read would go unnoticed.
    if (std::filesystem::exists(prefix + ".bin")) {
      fail(prefix, ".bin is there, but not its index ", prefix, ".idx: copy it, too, or remove the mask to learn every token");
    }
    return std::nullopt;
  }
  IndexedDataset mask(prefix);
  if (mask.code() != kUint8) fail(prefix, ".idx: dtype code ", mask.code(), ", but a mask has one uint8 (code 1) for each token");
  check_documents(data, mask);
  return LossMask(std::move(mask));
}

void LossMask::fail_value(int64_t token) const {
  const int64_t document = bytes_.document_at(token);
  fail(bytes_.prefix(), ".bin: document ", document, ", position ", token - bytes_.offset(document), ": value ",
       std::to_integer<int>(bytes_.stored()[static_cast<size_t>(token)]), ", but a mask says 1 (learned) or 0 (only read)");
}

void LossMask::read(int64_t document, int64_t begin, std::span<bool> out) const {
  const auto first = static_cast<size_t>(bytes_.offset(document) + begin);
  const std::span<const std::byte> from = bytes_.stored().subspan(first, out.size());
  for (size_t t = 0; t < out.size(); ++t) {
    if (from[t] > kLearned) fail_value(static_cast<int64_t>(first + t));
    out[t] = from[t] == kLearned;
  }
}

int64_t LossMask::learned(int64_t document, int64_t begin, int64_t size) const noexcept {
  const auto first = static_cast<size_t>(bytes_.offset(document) + begin);
  const std::span<const std::byte> from = bytes_.stored().subspan(first, static_cast<size_t>(size));
  return std::count(from.begin(), from.end(), kLearned);
}

void LossMask::check(int64_t begin, int64_t end) const {
  const std::span<const std::byte> all = bytes_.stored();
  const auto bad = std::find_if(all.begin() + begin, all.begin() + end, [](std::byte value) { return value > kLearned; });
  if (bad != all.begin() + end) fail_value(bad - all.begin());
}

bool LossMask::any(int64_t begin, int64_t end) const noexcept {
  return begin < end && std::memchr(bytes_.stored().data() + begin, 1, static_cast<size_t>(end - begin)) != nullptr;
}

}  // namespace upcycle
