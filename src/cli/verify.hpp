#pragma once
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "checkpoint/reader.hpp"

namespace upcycle {

/// What `verify` found out about a checkpoint.
struct Verification {
  std::vector<std::string> problems;  ///< one line each; empty: it is good
  std::string certificate;            ///< "passed", "failed", "none"
  std::string digest;                 ///< of the tensors; empty when they could not be read
  int64_t tensors = 0;
  int64_t values = 0;
};

/// Holds a checkpoint against its own manifest, against the catalogue of its architecture (every parameter there, with
/// the right shape and dtype, nothing else), reads every value, and asks the stored certificate. Throws UserError when
/// the architecture is none that this program knows.
Verification verify(const CheckpointReader&);

nlohmann::json to_json(const Verification&);

}  // namespace upcycle
