#include "data/shuffled_documents.hpp"

#include <algorithm>

#include "base/error.hpp"

namespace upcycle {
namespace {

constexpr int64_t kBlock = 32;  // documents per entry of block_begin
constexpr size_t kEpochs = 2;   // whose order is kept

}  // namespace

ShuffledDocuments::ShuffledDocuments(IndexedDataset data, int64_t begin, int64_t end, int64_t sequence, int64_t vocab,
                                     uint64_t seed, const std::string& name, const std::string& share)
    : data_(std::move(data)),
      mask_(LossMask::beside(data_)),
      share_(share),
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

template <class Visit>
void ShuffledDocuments::at_sample(int64_t index, Visit&& visit) const {
  const std::lock_guard lock(mutex_);
  const int64_t number = index / samples_;
  auto epoch = std::find_if(epochs_.begin(), epochs_.end(), [&](const Epoch& known) { return known.number == number; });
  if (epoch == epochs_.end()) {
    if (epochs_.size() == kEpochs) epochs_.erase(epochs_.begin());
    epoch = epochs_.insert(epochs_.end(), order(number));
  }
  visit(*epoch, epoch->skipped + epoch->samples(index % samples_) * sequence_);
}

template <class Visit>
void ShuffledDocuments::for_each_stretch(const Epoch& epoch, int64_t begin, int64_t count, Visit&& visit) const {
  // The last block that begins at or before `begin`; blocks of empty documents begin where the next one does.
  const auto block =
      std::upper_bound(epoch.block_begin.begin(), epoch.block_begin.end(), begin) - epoch.block_begin.begin() - 1;
  int64_t skip = begin - epoch.block_begin[block];
  for (int64_t i = block * kBlock; count > 0; ++i) {
    const int64_t document = begin_ + epoch.documents(i), length = data_.length(document);
    if (skip >= length) {
      skip -= length;
      continue;
    }
    const int64_t size = std::min(count, length - skip);
    visit(document, skip, size);
    count -= size;
    skip = 0;
  }
}

void ShuffledDocuments::sample(int64_t index, const SampleRoom& room) const {
  at_sample(index, [&](const Epoch& epoch, int64_t begin) {
    int64_t done = 0;   // tokens of the sample
    for_each_stretch(epoch, begin, sequence_ + 1, [&](int64_t document, int64_t position, int64_t size) {
      const auto part = room.tokens.subspan(done, size);
      data_.read(document, position, part);
      for (int64_t t = 0; t < size; ++t) {
        if (part[t] < 0 || part[t] >= vocab_) fail_token(data_, document, position + t, part[t], vocab_);
      }
      if (!room.starts.empty()) std::fill_n(room.starts.begin() + done, std::min(size, sequence_ - done), done);
      if (!room.learn.empty() && !mask_) std::fill_n(room.learn.begin() + done, std::min(size, sequence_ - done), true);
      if (!room.learn.empty() && mask_) {
        const int64_t no_label = done == 0 ? 1 : 0;   // the sample's first token is only read
        mask_->read(document, position + no_label, room.learn.subspan(done + no_label - 1, size - no_label));
      }
      done += size;
    });
  });
}

int64_t ShuffledDocuments::learned(int64_t index) const {
  if (!mask_) return sequence_;
  int64_t labels = 0;
  at_sample(index, [&](const Epoch& epoch, int64_t begin) {
    for_each_stretch(epoch, begin + 1, sequence_, [&](int64_t document, int64_t position, int64_t size) {
      labels += mask_->learned(document, position, size);
    });
  });
  return labels;
}

void ShuffledDocuments::check(int64_t vocab) const {
  constexpr int64_t kRead = 2'000'000'000, kPieces = 256, kPiece = 1 << 20;
  const int64_t first = data_.offset(begin_), end = first + tokens_;
  const auto check_part = [&](int64_t begin, int64_t end) {
    data_.check_tokens(vocab, begin, end);
    if (mask_) mask_->check(begin, end);
  };
  if (tokens_ < kRead) {
    check_part(first, end);
  } else {
    for (int64_t i = 0; i < kPieces; ++i) {
      // 128-bit, for tokens * 255 passes 2^63 at 3.6e16 tokens
      const auto begin = first + static_cast<int64_t>(static_cast<__int128>(tokens_ - kPiece) * i / (kPieces - 1));
      check_part(begin, begin + kPiece);
    }
  }
  if (mask_ && !mask_->any(first, end)) {
    fail(data_.prefix(), ".mask.bin: the ", share_, " has no token that is learned: its mask is 0 for all ", tokens_,
         " tokens. Is this the data set's own mask?");
  }
}

}  // namespace upcycle
