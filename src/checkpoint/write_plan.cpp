#include "checkpoint/write_plan.hpp"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>

#include "base/error.hpp"
#include "checkpoint/boxes.hpp"
#include "checkpoint/tensor_file.hpp"

namespace upcycle {
namespace {

// A box that one or several ranks hold, and the first and last of its elements in the tensor's row-major order.
struct Held {
  Box box;
  std::vector<int> ranks;
  ElementRange run;
};

struct Declared {
  TensorSpec spec;
  int first_rank;
  std::vector<Held> boxes;
};

// Boxes inside the tensor that don't overlap and have as many elements as it cover it.
void check(const Declared& tensor) {
  const auto wrong = [&](const auto&... what) {
    throw std::logic_error(text("tensor '", tensor.spec.name, "' ", describe(tensor.spec.shape), ": ", what...));
  };
  int64_t covered = 0;
  for (size_t i = 0; i < tensor.boxes.size(); ++i) {
    const Held& held = tensor.boxes[i];
    covered += elements(held.box);
    for (size_t j = 0; j < i; ++j) {
      const Held& other = tensor.boxes[j];
      if (other.run.end > held.run.begin && held.run.end > other.run.begin && intersection(held.box, other.box)) {
        wrong("the boxes ", describe(other.box), " of rank ", other.ranks[0], " and ", describe(held.box), " of rank ", held.ranks[0],
              " overlap");
      }
    }
  }
  if (covered != elements(tensor.spec.shape)) wrong("all ranks' boxes cover ", covered, " of ", elements(tensor.spec.shape), " elements");
}

// Bytes that each rank has to write and to send so far.
struct Loads {
  std::vector<int64_t> written, sent;
};

WritePlan::Block plan_block(const Declared& tensor, size_t index, int64_t number, const ElementRange& run, Loads& loads) {
  struct Choice {
    Box box;
    const Held* held;
  };
  std::vector<Choice> choices;
  const std::vector<Box> rows = boxes_of_run(tensor.spec.shape, run.begin, run.end);
  for (const Held& held : tensor.boxes) {
    if (held.run.end <= run.begin || held.run.begin >= run.end) continue;
    for (const Box& row : rows) {
      if (const auto box = intersection(row, held.box)) choices.push_back({*box, &held});
    }
  }
  std::sort(choices.begin(), choices.end(), [&](const Choice& a, const Choice& b) { return a.box.begin < b.box.begin; });
  std::map<int, int64_t> holds;   // elements, by rank
  for (const Choice& choice : choices) {
    for (const int rank : choice.held->ranks) holds[rank] += elements(choice.box);
  }
  const auto more = [&](const auto& a, const auto& b) {   // ties go to whoever has the least to do
    const auto rank = [&](const auto& x) { return std::tuple(-x.second, loads.written[static_cast<size_t>(x.first)], x.first); };
    return rank(a) < rank(b);
  };
  WritePlan::Block block{index, number, std::min_element(holds.begin(), holds.end(), more)->first, {}};
  const int64_t width = tensor.spec.width();
  loads.written[static_cast<size_t>(block.writer)] += run.size() * width;
  for (const Choice& choice : choices) {
    const std::vector<int>& ranks = choice.held->ranks;
    int from = block.writer;
    if (std::find(ranks.begin(), ranks.end(), from) == ranks.end()) {
      from = *std::min_element(ranks.begin(), ranks.end(), [&](int a, int b) {
        return loads.sent[static_cast<size_t>(a)] < loads.sent[static_cast<size_t>(b)];
      });
      loads.sent[static_cast<size_t>(from)] += elements(choice.box) * width;
    }
    block.parts.push_back({from, choice.box});
  }
  return block;
}

std::map<std::string, Declared> parse(std::span<const std::string> declarations) {
  std::map<std::string, Declared> tensors;
  for (size_t rank = 0; rank < declarations.size(); ++rank) {
    for (const auto& piece : nlohmann::json::parse(declarations[rank])) {
      const TensorSpec spec{piece[0], static_cast<at::ScalarType>(piece[1].get<int>()), piece[2].get<Shape>()};
      hdf5_path(spec.name);
      Declared& tensor = tensors.try_emplace(spec.name, Declared{spec, static_cast<int>(rank), {}}).first->second;
      if (tensor.spec != spec) {
        throw std::logic_error(text("tensor '", spec.name, "': rank ", rank, " says ", c10::toString(spec.dtype), describe(spec.shape),
                                    ", rank ", tensor.first_rank, " says ", c10::toString(tensor.spec.dtype), describe(tensor.spec.shape)));
      }
      const Box box{piece[3].get<Shape>(), piece[4].get<Shape>()};
      if (!inside(box, spec.shape)) {
        throw std::logic_error(text("tensor '", spec.name, "' ", describe(spec.shape), ": the box ", describe(box), " of rank ", rank,
                                    " is not inside"));
      }
      if (elements(box) == 0) continue;
      const auto same = std::find_if(tensor.boxes.begin(), tensor.boxes.end(), [&](const Held& held) { return held.box == box; });
      if (same == tensor.boxes.end()) {
        tensor.boxes.push_back({box, {static_cast<int>(rank)}, span_of(box, spec.shape)});
      } else if (same->ranks.back() != static_cast<int>(rank)) {
        same->ranks.push_back(static_cast<int>(rank));
      } else {
        throw std::logic_error(text("tensor '", spec.name, "' ", describe(spec.shape), ": the boxes ", describe(box), " of rank ", rank, " and ",
                                    describe(box), " of rank ", rank, " overlap"));
      }
    }
  }
  return tensors;
}

}  // namespace

bool WritePlan::Block::travels() const {
  return std::any_of(parts.begin(), parts.end(), [&](const Part& part) { return part.rank != writer; });
}

std::string declare(std::span<const Piece> pieces) {
  nlohmann::json out = nlohmann::json::array();
  for (const Piece& piece : pieces) {
    if (piece.local.defined() && piece.local.sizes() != at::IntArrayRef(piece.box.size)) {
      throw std::logic_error(text("tensor '", piece.name, "': a piece of shape ", describe(piece.local.sizes().vec()), " for the box ",
                                  describe(piece.box)));
    }
    out.push_back({piece.name, static_cast<int>(piece.dtype()), piece.shape, piece.box.begin, piece.box.size});
  }
  return out.dump();
}

WritePlan plan_writes(std::span<const std::string> declarations) {
  WritePlan plan;
  Loads loads{std::vector<int64_t>(declarations.size()), std::vector<int64_t>(declarations.size())};
  for (const auto& [name, tensor] : parse(declarations)) {
    check(tensor);
    const Blocks blocks = tensor.spec.blocks();
    for (int64_t number = 0; number < blocks.count(); ++number) {
      plan.blocks.push_back(plan_block(tensor, plan.tensors.size(), number, blocks.run(number), loads));
    }
    plan.tensors.push_back(tensor.spec);
  }
  return plan;
}

std::vector<std::vector<size_t>> rounds(const WritePlan& plan, int64_t bytes) {
  std::vector<std::vector<size_t>> out;
  std::map<int, int64_t> sent, received;   // in the last round
  for (size_t i = 0; i < plan.blocks.size(); ++i) {
    const WritePlan::Block& block = plan.blocks[i];
    if (!block.travels()) continue;
    const int64_t width = plan.tensors[block.tensor].width();
    std::map<int, int64_t> more;
    int64_t arrives = 0;
    for (const WritePlan::Part& part : block.parts) {
      if (part.rank == block.writer) continue;
      more[part.rank] += elements(part.box) * width;
      arrives += elements(part.box) * width;
    }
    const bool full = received[block.writer] + arrives > bytes ||
                      std::any_of(more.begin(), more.end(), [&](const auto& from) { return sent[from.first] + from.second > bytes; });
    if (out.empty() || full) {
      out.emplace_back();
      sent.clear();
      received.clear();
    }
    out.back().push_back(i);
    received[block.writer] += arrives;
    for (const auto& [rank, size] : more) sent[rank] += size;
  }
  return out;
}

}  // namespace upcycle
