#include "model/holders.hpp"

#include <algorithm>
#include <stdexcept>
#include <unordered_map>

namespace upcycle {
namespace {

std::vector<int> owners(const ParameterSpec& spec, const Layout& layout) {
  std::vector<int> stages;
  for (int stage = 0; stage < layout.grid.size(Axis::pipeline); ++stage) {
    if (owns(spec, layout, stage)) stages.push_back(stage);
  }
  return stages;
}

/// Into how many different parts the ranks along its axis really cut the parameter: no more than it has units there.
int64_t distinct_parts(const Cut& cut, const Grid& grid) {
  const int64_t parts = grid.size(cut.axis);
  return cut.units == 0 ? parts : std::min(cut.units, parts);
}

/// Ranks of one stage hold the same box when they agree in this number.
int64_t box_number(const ParameterSpec& spec, const Grid& grid, const Coordinates& here) {
  int64_t number = 0;
  for (const Cut& cut : spec.cuts) {
    const int64_t parts = distinct_parts(cut, grid);
    number = number * parts + here[cut.axis] * parts / grid.size(cut.axis);
  }
  return number;
}

std::vector<int64_t> kind_of(const ParameterSpec& spec, const Layout& layout) {
  std::vector<int64_t> kind = {owners(spec, layout).size() > 1};
  for (const Cut& cut : spec.cuts) {
    kind.push_back(static_cast<int64_t>(cut.axis));
    kind.push_back(distinct_parts(cut, layout.grid));
  }
  return kind;
}

Partition partition_of(const ParameterSpec& spec, const Layout& layout) {
  const Grid& grid = layout.grid;
  const std::vector<int> stages = owners(spec, layout);
  Partition leaders(static_cast<size_t>(grid.world()));
  std::unordered_map<int64_t, int> first;
  for (int rank = 0; rank < grid.world(); ++rank) {
    const Coordinates here = grid.at(rank);
    int stage = here[Axis::pipeline];
    if (stages.size() > 1) {
      if (std::find(stages.begin(), stages.end(), stage) == stages.end()) {
        leaders[static_cast<size_t>(rank)] = rank;
        continue;
      }
      stage = stages.front();   // one group over all of them
    }
    const int64_t number = box_number(spec, grid, here) * grid.size(Axis::pipeline) + stage;
    leaders[static_cast<size_t>(rank)] = first.emplace(number, rank).first->second;
  }
  return leaders;
}

}  // namespace

std::vector<int> holders(const ParameterSpec& spec, const Layout& layout, int rank) {
  const Grid& grid = layout.grid;
  const std::vector<int> stages = owners(spec, layout);
  const int stage_size = grid.world() / grid.size(Axis::pipeline);   // a stage's ranks lie side by side
  if (std::find(stages.begin(), stages.end(), rank / stage_size) == stages.end()) return {};
  const int64_t mine = box_number(spec, grid, grid.at(rank));
  std::vector<int> ranks;
  for (const int stage : stages) {
    for (int other = stage * stage_size; other < (stage + 1) * stage_size; ++other) {
      if (box_number(spec, grid, grid.at(other)) == mine) ranks.push_back(other);
    }
  }
  return ranks;
}

int num_holders(const ParameterSpec& spec, const Layout& layout) {
  int64_t ranks = static_cast<int64_t>(owners(spec, layout).size()) * layout.grid.world() / layout.grid.size(Axis::pipeline);
  for (const Cut& cut : spec.cuts) ranks /= distinct_parts(cut, layout.grid);
  return static_cast<int>(ranks);
}

HolderGroups::HolderGroups(const Architecture& architecture, const Layout& layout) : layout_(layout) {
  for (const ParameterSpec& spec : catalogue(architecture)) {
    const std::vector<int64_t> kind = kind_of(spec, layout);
    if (std::find(kinds_.begin(), kinds_.end(), kind) != kinds_.end()) continue;
    kinds_.push_back(kind);
    const Partition partition = partition_of(spec, layout);
    auto same = std::find(partitions_.begin(), partitions_.end(), partition);
    if (same == partitions_.end()) same = partitions_.insert(same, partition);
    partition_of_kind_.push_back(static_cast<size_t>(same - partitions_.begin()));
  }
}

size_t HolderGroups::of(const ParameterSpec& spec) const {
  const auto kind = std::find(kinds_.begin(), kinds_.end(), kind_of(spec, layout_));
  if (kind == kinds_.end()) throw std::logic_error(spec.name + " is not of this model");
  return partition_of_kind_[static_cast<size_t>(kind - kinds_.begin())];
}

Place HolderGroups::place(size_t group, int rank) const {
  const Partition& leaders = partitions_.at(group);
  const int leader = leaders.at(static_cast<size_t>(rank)), stage_size = layout_.grid.world() / layout_.grid.size(Axis::pipeline);
  Place place{.holders = 0};
  for (int other = leader; other < layout_.grid.world(); ++other) {
    if (leaders[static_cast<size_t>(other)] != leader) continue;
    if (other == rank) place.index = place.holders;
    ++place.holders;
    if (other / stage_size != leader / stage_size) place.spans_stages = true;
  }
  return place;
}

}  // namespace upcycle
