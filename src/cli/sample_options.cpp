#include <boost/program_options.hpp>
#include <cmath>

#include "cli/option_values.hpp"

namespace upcycle {

namespace po = boost::program_options;

void add_sample_options(po::options_description& options) {
  auto add = options.add_options();
  const auto word = [](const char* name) { return po::value<std::string>()->value_name(name); };
  add("prompt", word("TEXT"), "what to go on with");
  add("prompt-file", word("FILE"), "the same, out of a file");
  add("tokens", word("N"), "the most tokens to say (default: 128)");
  add("temperature", word("T"), "logits are divided by it (default: 0, always the likeliest token)");
  add("top-p", word("P"), "choose among the likeliest tokens that together have this probability (default: 1, all)");
  add("seed", word("S"), "of the random numbers (default: 0)");
  add("samples", word("N"), "how many texts, each with random numbers of its own (default: 1)");
  add("routing", po::bool_switch(), "for each token the experts that its prediction came from, layer by layer");
  add("device", word("DEVICE"), "auto, cpu or cuda (default: auto)");
}

SampleOptions sample_options(const po::variables_map& values) {
  SampleOptions out;
  const auto given = [&](const char* name, const auto& take) {
    if (values.count(name)) take(values[name].as<std::string>());
  };
  given("prompt", [&](const std::string& value) { out.prompt = value; });
  given("prompt-file", [&](const std::string& value) { out.prompt_file = value; });
  given("tokens", [&](const std::string& value) { out.tokens = positive_integer(value, "--tokens"); });
  given("temperature", [&](const std::string& value) {
    const auto good = [](double t) { return t >= 0 && std::isfinite(t); };
    out.temperature = number<double>(value, "--temperature", "a number that is not negative", good);
  });
  given("top-p", [&](const std::string& value) {
    out.top_p = number<double>(value, "--top-p", "a number above 0 and up to 1", [](double p) { return p > 0 && p <= 1; });
  });
  given("seed", [&](const std::string& value) {
    out.seed = number<uint64_t>(value, "--seed", "an integer that is not negative", [](uint64_t) { return true; });
  });
  given("samples", [&](const std::string& value) { out.samples = positive_integer(value, "--samples"); });
  given("device", [&](const std::string& value) { out.device = value; });
  out.routing = values["routing"].as<bool>();
  return out;
}

}  // namespace upcycle
