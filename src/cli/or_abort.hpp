#pragma once
#include <exception>

#include "base/fault.hpp"
#include "parallel/nccl.hpp"

namespace upcycle {

/// What `action` returns. The other ranks may wait for this one in NCCL, and this one's GPU for them: when something is thrown, whatever
/// still runs there is given up, or nothing would ever be freed. A mistake that all ranks have met leaves NCCL in order.
template <class Action>
auto or_abort_nccl(Action&& action) {
  try {
    return action();
  } catch (const UserError& mistake) {
    if (dynamic_cast<const LonelyMistake*>(&mistake)) nccl::abort_all();
    throw;
  } catch (...) {
    nccl::abort_all();
    throw;
  }
}

}  // namespace upcycle
