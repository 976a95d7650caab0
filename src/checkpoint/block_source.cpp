#include "checkpoint/block_source.hpp"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <cstring>
#include <stdexcept>

#include "base/autograd.hpp"
#include "base/error.hpp"
#include "checkpoint/boxes.hpp"

namespace upcycle {
namespace {

void copy_rows(const std::byte* from, std::byte* to, at::IntArrayRef size, at::IntArrayRef from_strides,
               at::IntArrayRef to_strides, int64_t width) {
  if (size.empty()) {
    std::memcpy(to, from, static_cast<size_t>(width));
    return;
  }
  if (size.size() == 1 && from_strides[0] == 1 && to_strides[0] == 1) {
    std::memcpy(to, from, static_cast<size_t>(size[0] * width));
    return;
  }
  for (int64_t i = 0; i < size[0]; ++i) {
    copy_rows(from + i * from_strides[0] * width, to + i * to_strides[0] * width, size.slice(1), from_strides.slice(1), to_strides.slice(1),
              width);
  }
}

// Plain memory is copied without LibTorch, which would start threads of its own for the writer's thread.
void copy(const Tensor& from, const Tensor& to) {
  if (!from.is_cpu()) {
    to.copy_(from);
  } else if (from.is_contiguous() && to.is_contiguous()) {
    std::memcpy(to.mutable_data_ptr(), from.const_data_ptr(), from.nbytes());
  } else {
    const auto* data = static_cast<const std::byte*>(from.const_data_ptr());
    copy_rows(data, static_cast<std::byte*>(to.mutable_data_ptr()), from.sizes(), from.strides(), to.strides(), from.element_size());
  }
}

// The view of a block's memory that holds `part` of its tensor.
Tensor place_of(const TensorSpec& spec, const ElementRange& run, const Box& part, std::byte* memory) {
  int64_t at = 0;
  for (const Box& row : boxes_of_run(spec.shape, run.begin, run.end)) {
    bool here = true;
    for (size_t dim = 0; dim < row.size.size(); ++dim) {
      here = here && part.begin[dim] >= row.begin[dim] && part.begin[dim] + part.size[dim] <= row.begin[dim] + row.size[dim];
    }
    if (here) return view_of(at::from_blob(memory + at * spec.width(), row.size, at::TensorOptions(spec.dtype)), relative_to(part, row));
    at += elements(row);
  }
  throw std::logic_error(text("tensor '", spec.name, "': ", describe(part), " is no part of its block"));
}

}  // namespace

BlockSource::BlockSource(const WritePlan& plan, std::span<const Piece> pieces, int rank, int ranks)
    : plan_(plan), rank_(rank), ranks_(static_cast<size_t>(ranks)), pieces_(pieces.begin(), pieces.end()) {
  for (size_t i = 0; i < pieces_.size(); ++i) of_tensor_[pieces_[i].name].push_back(i);
}

int64_t BlockSource::bytes(const WritePlan& plan, const WritePlan::Block& block) {
  const TensorSpec& spec = plan.tensors[block.tensor];
  return spec.blocks().run(block.number).size() * spec.width();
}

void BlockSource::copy_own(const WritePlan::Block& block, const Box& part, const Tensor& target) const {
  const TensorSpec& spec = plan_.tensors[block.tensor];
  for (const size_t index : of_tensor_.at(spec.name)) {
    const Piece& piece = pieces_[index];
    const Box inner = relative_to(part, piece.box);
    if (!inside(inner, piece.box.size)) continue;
    if (piece.local.defined()) return copy(view_of(piece.local.detach(), inner), target);
    if (target.is_contiguous()) return piece.read(part, target);
    const Tensor values = at::empty(part.size, at::TensorOptions(spec.dtype));
    piece.read(part, values);
    return copy(values, target);
  }
  throw std::logic_error(text("tensor '", spec.name, "': no piece of rank ", rank_, " holds ", describe(part)));
}

void BlockSource::fill(const WritePlan::Block& block, std::byte* memory) const {
  const Unrecorded guard;
  const TensorSpec& spec = plan_.tensors[block.tensor];
  const ElementRange run = spec.blocks().run(block.number);
  for (const WritePlan::Part& part : block.parts) {
    if (part.rank == rank_) copy_own(block, part.box, place_of(spec, run, part.box, memory));
  }
}

template <class Act>
void BlockSource::each_travelling(std::span<const size_t> round, Act&& act) const {
  for (const size_t index : round) {
    const WritePlan::Block& block = plan_.blocks[index];
    for (const WritePlan::Part& part : block.parts) {
      if (part.rank != block.writer) act(block, part, elements(part.box) * plan_.tensors[block.tensor].width());
    }
  }
}

std::vector<Tensor> BlockSource::pack(std::span<const size_t> round) const {
  const Unrecorded guard;
  std::vector<int64_t> size(ranks_), at(ranks_);
  each_travelling(round, [&](const WritePlan::Block& block, const WritePlan::Part& part, int64_t bytes) {
    if (part.rank == rank_) size[static_cast<size_t>(block.writer)] += bytes;
  });
  std::vector<Tensor> packed(ranks_);
  for (size_t peer = 0; peer < ranks_; ++peer) {
    if (size[peer] > 0) packed[peer] = at::empty({size[peer]}, at::kByte);
  }
  each_travelling(round, [&](const WritePlan::Block& block, const WritePlan::Part& part, int64_t bytes) {
    if (part.rank != rank_) return;
    const auto peer = static_cast<size_t>(block.writer);
    auto* memory = packed[peer].mutable_data_ptr<uint8_t>() + at[peer];
    copy_own(block, part.box, at::from_blob(memory, part.box.size, at::TensorOptions(plan_.tensors[block.tensor].dtype)));
    at[peer] += bytes;
  });
  return packed;
}

std::vector<Tensor> BlockSource::exchange(const Communicator& world, std::span<const size_t> round, const std::vector<Tensor>& packed) const {
  std::vector<int64_t> size(ranks_);
  each_travelling(round, [&](const WritePlan::Block& block, const WritePlan::Part& part, int64_t bytes) {
    if (block.writer == rank_) size[static_cast<size_t>(part.rank)] += bytes;
  });
  std::vector<Tensor> arrived(ranks_);
  std::vector<Communicator::Message> sent, received;
  for (size_t peer = 0; peer < ranks_; ++peer) {
    if (packed[peer].defined()) sent.push_back({static_cast<int>(peer), packed[peer]});
    if (size[peer] > 0) received.push_back({static_cast<int>(peer), arrived[peer] = at::empty({size[peer]}, at::kByte)});
  }
  world.send_receive(sent, received);
  return arrived;
}

void BlockSource::unpack(const WritePlan::Block& block, const std::vector<Tensor>& arrived, std::vector<int64_t>& taken, std::byte* memory) const {
  const TensorSpec& spec = plan_.tensors[block.tensor];
  const ElementRange run = spec.blocks().run(block.number);
  for (const WritePlan::Part& part : block.parts) {
    if (part.rank == rank_) continue;
    const auto peer = static_cast<size_t>(part.rank);
    auto* data = arrived[peer].mutable_data_ptr<uint8_t>() + taken[peer];
    copy(at::from_blob(data, part.box.size, at::TensorOptions(spec.dtype)), place_of(spec, run, part.box, memory));
    taken[peer] += elements(part.box) * spec.width();
  }
}

}  // namespace upcycle
