#pragma once
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "checkpoint/reader.hpp"
#include "parallel/communicator.hpp"

namespace upcycle {

/// What `verify` found out about a checkpoint.
struct Verification {
  std::vector<std::string> problems;  ///< one line each; empty: it is good
  std::string certificate;            ///< "passed", "failed", "none"
  std::string digest;                 ///< of the tensors; empty when they could not be read
  int64_t tensors = 0;
  int64_t values = 0;                 ///< that were read, by all ranks together
  int64_t bytes = 0;                  ///< of these values
  double seconds = 0.0;               ///< that reading took
};

/// **Collective.** Holds a checkpoint against its own manifest, against the catalogue of its architecture (every parameter there, with
/// the right shape and dtype, nothing else), reads every value, each rank a part of them, and asks the stored certificate. The same on
/// all ranks. Throws UserError when the architecture is none that this program knows.
Verification verify(const CheckpointReader&, const Communicator& world);

nlohmann::json to_json(const Verification&);

}  // namespace upcycle
