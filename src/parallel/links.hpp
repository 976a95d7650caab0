#pragma once
#include <c10/core/Device.h>

#include <utility>
#include <vector>

#include "parallel/communicator.hpp"

/// How fast nodes talk to each other.
namespace upcycle::links {

/// The pairs of neighbours on a ring of `nodes`, in rounds in which nobody is in two: two rounds, three for an odd number; each node has
/// two pairs, of two nodes only one. Pure.
std::vector<std::vector<std::pair<int, int>>> ring_rounds(int nodes);

/// **Collective** over a group of two. GB/s that each gets from the other while both send at once, the best of three messages of 64 MiB,
/// smaller ones where those would take seconds. CPU memory by MPI; a GPU's as the group's tensors travel.
double exchange_speed(const Communicator& pair, c10::Device device);

/// **Collective.** GB/s of an all-reduce, as bytes that leave each rank: 2 (n - 1) / n of the tensor's, whatever the algorithm.
double all_reduce_speed(const Communicator& world, c10::Device device);

}  // namespace upcycle::links
