#include "base/trace_range.hpp"

#include <ATen/record_function.h>

#include <string_view>
#include <vector>

namespace upcycle {
namespace {

thread_local std::vector<const std::string*> open_ranges;

}  // namespace

struct TraceRange::Record {
  explicit Record(std::string given) : name(std::move(given)), function(at::RecordScope::USER_SCOPE) {
    open_ranges.push_back(&name);
    if (function.isActive()) function.before(std::string_view(name));
  }
  ~Record() { open_ranges.pop_back(); }

  std::string name;
  at::RecordFunction function;
};

void TraceRange::begin(std::string name) { record_ = new Record(std::move(name)); }

void TraceRange::end() { delete record_; }

std::string TraceRange::here() {
  if (!listening() || open_ranges.empty()) return {};
  const size_t open = open_ranges.size();
  return open == 1 ? *open_ranges[0] : *open_ranges[open - 2] + '/' + *open_ranges[open - 1];
}

}  // namespace upcycle
