#pragma once
#include <optional>
#include <string>

namespace upcycle {

/// Prints what is in the token files <prefix>.bin and .idx, and, where it is there, in <prefix>.mask; text where a tokenizer's directory
/// is given. Throws UserError when the files are damaged, or are not of this tokenizer.
void inspect_data(const std::string& prefix, const std::optional<std::string>& tokenizer_directory, bool json);

}  // namespace upcycle
