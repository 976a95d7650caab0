#pragma once
#include "base/error.hpp"

namespace upcycle {

/// Values of a checkpoint are not those that were written.
class DamagedCheckpoint : public UserError {
 public:
  using UserError::UserError;
};

}  // namespace upcycle
