#pragma once
#include "parallel/communicator.hpp"

namespace upcycle {

/// **Collective.** `action` on the first rank of `world` alone; what it throws is everybody's error.
template <class Action>
void on_first_rank(const Communicator& world, Action&& action) {
  world.together([&] {
    if (world.rank() == 0) action();
  });
}

}  // namespace upcycle
