#include "cli/tensor_distance.hpp"

#include <ATen/ops/empty.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <type_traits>

#include "base/error.hpp"
#include "checkpoint/boxes.hpp"

namespace upcycle {
namespace {

/// Values of one dtype are the same when their bits are: a NaN is itself, and 0 is not -0.
template <class A, class B>
bool same_value(const A& a, const B& b) {
  if constexpr (std::is_same_v<A, B>) {
    return std::memcmp(&a, &b, sizeof a) == 0;
  } else {
    const double x = static_cast<double>(a), y = static_cast<double>(b);
    return x == y || (std::isnan(x) && std::isnan(y));
  }
}

template <class A, class B>
void add_values(TensorDistance& sum, const A* a, const B* b, int64_t count) {
  sum.elements += count;
  for (int64_t i = 0; i < count; ++i) {
    const double x = static_cast<double>(a[i]);
    if (std::isfinite(x)) sum.reference += x * x;
    if (same_value(a[i], b[i])) continue;
    ++sum.differ;
    const double apart = std::abs(x - static_cast<double>(b[i]));
    if (!std::isfinite(apart)) {
      ++sum.not_finite;
      continue;
    }
    sum.max_abs = std::max(sum.max_abs, apart);
    sum.squares += apart * apart;
  }
}

template <class Use>
void with_values(const Tensor& x, const Use& use) {
  if (x.scalar_type() == at::kFloat) return use(x.const_data_ptr<float>());
  if (x.scalar_type() == at::kBFloat16) return use(x.const_data_ptr<c10::BFloat16>());
  if (x.scalar_type() == at::kLong) return use(x.const_data_ptr<int64_t>());
  throw std::logic_error(text("a checkpoint with a tensor of ", c10::toString(x.scalar_type())));
}

/// Elements [begin, begin + count) of a tensor, in row-major order and its stored dtype.
Tensor run_of(const CheckpointReader& reader, const std::string& file, const StoredTensor& stored, const std::string& name, int64_t begin, int64_t count) {
  const Tensor out = at::empty({count}, at::TensorOptions(stored.dtype));
  std::vector<Piece> pieces;
  int64_t at = 0;
  for (const Box& box : boxes_of_run(stored.shape, begin, begin + count)) {
    pieces.push_back({name, stored.shape, box, out.narrow(0, at, elements(box)).view(box.size)});
    at += elements(box);
  }
  reader.fill(file, pieces);
  return out;
}

/// A block that is what was written.
Tensor sound_block(const CheckpointReader& reader, const std::string& file, const std::string& name, int64_t number) {
  StoredBlock block = reader.block(file, name, number);
  if (!block.complaint.empty()) throw DamagedCheckpoint(block.complaint);
  return std::move(block.values);
}

}  // namespace

double TensorDistance::relative_l2() const {
  if (squares == 0.0) return 0.0;
  return reference == 0.0 ? std::numeric_limits<double>::infinity() : std::sqrt(squares / reference);
}

void TensorDistance::add(const TensorDistance& other) {
  elements += other.elements;
  differ += other.differ;
  not_finite += other.not_finite;
  max_abs = std::max(max_abs, other.max_abs);
  squares += other.squares;
  reference += other.reference;
}

TensorDistance tensor_distance(const CheckpointReader& a, const CheckpointReader& b, const std::string& file, const std::string& name) {
  const StoredTensor &here = a.tensors(file).at(name), &there = b.tensors(file).at(name);
  const bool same_blocks = c10::elementSize(here.dtype) == c10::elementSize(there.dtype);
  TensorDistance out;
  for (int64_t number = 0; number < a.blocks(file, name); ++number) {
    const Tensor ours = sound_block(a, file, name, number);
    const Tensor theirs = same_blocks ? sound_block(b, file, name, number) : run_of(b, file, there, name, out.elements, ours.numel());
    with_values(ours, [&](const auto* x) {
      with_values(theirs, [&](const auto* y) { add_values(out, x, y, ours.numel()); });
    });
  }
  return out;
}

}  // namespace upcycle
