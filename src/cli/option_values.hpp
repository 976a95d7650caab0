#pragma once
#include <boost/program_options/options_description.hpp>
#include <boost/program_options/variables_map.hpp>
#include <charconv>
#include <string>

#include "base/error.hpp"
#include "cli/command.hpp"

namespace upcycle {

/// The whole of `value` as a number that is `good`.
template <class Number, class Good>
Number number(const std::string& value, const std::string& option, const char* expected, const Good& good) {
  Number number = 0;
  const auto [rest, code] = std::from_chars(value.data(), value.data() + value.size(), number);
  if (code != std::errc() || rest != value.data() + value.size() || !good(number)) fail(option, " ", value, ": ", expected, " is expected");
  return number;
}

inline int positive_integer(const std::string& value, const std::string& option) {
  return number<int>(value, option, "a positive integer", [](int n) { return n >= 1; });
}

inline double positive_number(const std::string& value, const std::string& option, const char* expected) {
  return number<double>(value, option, expected, [](double x) { return x > 0 && x < 1e9; });
}

/// The options of `sample`: named, and read out of what was given. Throws UserError naming option and value.
void add_sample_options(boost::program_options::options_description&);
SampleOptions sample_options(const boost::program_options::variables_map& values);

}  // namespace upcycle
