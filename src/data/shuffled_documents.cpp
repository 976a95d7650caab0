#include "data/shuffled_documents.hpp"

#include <algorithm>

#include "base/error.hpp"

namespace upcycle {
namespace {

constexpr int64_t kBlock = 32;  // documents per entry of block_begin

}  // namespace

ShuffledDocuments::ShuffledDocuments(IndexedDataset data, int64_t begin, int64_t end, int64_t sequence, int64_t vocab,
                                     uint64_t seed, const std::string& name, const std::string& share)
    : data_(std::move(data)),
      begin_(begin),
      end_(end),
      sequence_(sequence),
      vocab_(vocab),
      tokens_(data_.offset(end) - data_.offset(begin)),
      samples_((tokens_ - 1) / sequence),
      document_keys_(seed, name + "/documents"),
      sample_keys_(seed, name + "/samples"),
      skip_(seed, name + "/skipped") {
  if (tokens_ <= sequence) {
    fail(data_.prefix(), ": the ", share, " has ", tokens_, " tokens in ", end - begin, " of ", data_.documents(),
         " documents, but one sample of [train].sequence = ", sequence, " needs ", sequence + 1,
         "; change [data].split, name a data set of its own, or shorten the sequence");
  }
}

ShuffledDocuments::Epoch ShuffledDocuments::order(int64_t epoch) const {
  const int64_t slack = tokens_ - 1 - samples_ * sequence_;
  Epoch order{epoch,
              Permutation(end_ - begin_, document_keys_, epoch),
              Permutation(samples_, sample_keys_, epoch),
              static_cast<int64_t>(skip_.below(slack + 1, epoch)),
              {}};
  int64_t passed = 0;
  for (int64_t i = 0; i < end_ - begin_; ++i) {
    if (i % kBlock == 0) order.block_begin.push_back(passed);
    passed += data_.length(begin_ + order.documents(i));
  }
  return order;
}

void ShuffledDocuments::read_stream(const Epoch& epoch, int64_t begin, std::span<int64_t> out, std::span<int64_t> starts) const {
  // The last block that begins at or before `begin`; blocks of empty documents begin where the next one does.
  const auto block =
      std::upper_bound(epoch.block_begin.begin(), epoch.block_begin.end(), begin) - epoch.block_begin.begin() - 1;
  int64_t skip = begin - epoch.block_begin[block];
  int64_t start = 0;
  for (int64_t i = block * kBlock; !out.empty(); ++i) {
    const int64_t document = begin_ + epoch.documents(i), length = data_.length(document);
    if (skip >= length) {
      skip -= length;
      continue;
    }
    const auto part = out.first(std::min<size_t>(out.size(), length - skip));
    data_.read(document, skip, part);
    for (size_t t = 0; t < part.size(); ++t) {
      if (part[t] < 0 || part[t] >= vocab_)
        fail_token(data_, document, skip + static_cast<int64_t>(t), part[t], vocab_);
    }
    const size_t marked = std::min(starts.size(), part.size());
    std::fill_n(starts.begin(), marked, start);
    starts = starts.subspan(marked);
    out = out.subspan(part.size());
    start += static_cast<int64_t>(part.size());
    skip = 0;
  }
}

void ShuffledDocuments::sample(int64_t index, std::span<int64_t> out, std::span<int64_t> starts) const {
  const std::lock_guard lock(mutex_);
  const int64_t number = index / samples_;
  if (epoch_.empty() || epoch_.front().number != number) {
    epoch_.clear();
    epoch_.push_back(order(number));
  }
  const Epoch& epoch = epoch_.front();
  read_stream(epoch, epoch.skipped + epoch.samples(index % samples_) * sequence_, out, starts);
}

void ShuffledDocuments::check(int64_t vocab) const {
  constexpr int64_t kRead = 2'000'000'000, kPieces = 256, kPiece = 1 << 20;
  const int64_t first = data_.offset(begin_);
  if (tokens_ < kRead) return data_.check_tokens(vocab, first, first + tokens_);
  for (int64_t i = 0; i < kPieces; ++i) {
    // 128-bit, for tokens * 255 passes 2^63 at 3.6e16 tokens
    const auto begin = first + static_cast<int64_t>(static_cast<__int128>(tokens_ - kPiece) * i / (kPieces - 1));
    data_.check_tokens(vocab, begin, begin + kPiece);
  }
}

}  // namespace upcycle
