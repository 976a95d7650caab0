#pragma once
#include <stdlib.h>

#include "base/error.hpp"
#include "parallel/mesh.hpp"

namespace upcycle {

/// NCCL refuses two ranks of one host on one GPU: from here on each rank looks like a host of its own to it, and they meet on the loopback
/// device. NCCL reads it once: call it before the first group is made.
inline void hosts_of_their_own() {
  setenv("NCCL_HOSTID", text("rank", world_rank()).c_str(), 1);
  setenv("NCCL_SOCKET_IFNAME", "lo", 1);
  setenv("NCCL_IB_DISABLE", "1", 1);
  setenv("NCCL_NVLS_ENABLE", "0", 1);
}

}  // namespace upcycle
