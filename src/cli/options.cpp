// From the words of a command line to Arguments: each command's options, its page of help, and what is said of a word that fits nowhere.
#include <boost/program_options.hpp>

#include "base/error.hpp"
#include "cli/command.hpp"
#include "cli/option_values.hpp"
#include "cli/usage.hpp"
#include "cli/version.hpp"
#include "config/suggest.hpp"

namespace upcycle {
namespace {

namespace po = boost::program_options;

po::options_description options_of(const Usage* usage) {
  po::options_description options("Options");
  auto add = options.add_options();
  if (usage && usage->run_file) {
    add("set", po::value<std::vector<std::string>>()->composing()->multitoken()->value_name("key=value ..."),
        "override keys of the run file, such as train.steps=10");
  }
  if (usage && usage->command == "train") {
    add("accept-changes", po::bool_switch(),
        "go on from the newest checkpoint although keys that change what is computed are others now; they are listed");
    add("profile", po::value<std::string>()->value_name("FILE"),
        "trace 3 steps, after 5 others, into FILE (.json), which ui.perfetto.dev opens; with several ranks one FILE-rankN each");
  }
  if (usage && usage->command == "plan") {
    add("ranks", po::value<std::string>()->value_name("N"),
        "ranks to plan for (default: the fewest that [parallel] allows)");
    add("gpu-memory", po::value<std::string>()->value_name("SIZE"),
        "memory of each rank's GPU, such as 141GB or 64GiB (default: 80GB is assumed)");
  }
  if (usage && usage->command == "check") {
    add("files-only", po::bool_switch(), "check what can be read from here, without MPI, and say only what is wrong");
    add("print", po::value<std::string>()->value_name("KEY"), "print the value of a key, such as run.directory, as train would have it, and leave");
    add("bandwidth-floor", po::value<std::string>()->value_name("GB/s"),
        "the least that each node must exchange with a neighbour, in each direction (default: none)");
    add("wait", po::value<std::string>()->value_name("SECONDS"),
        text("the most until all ranks have come together; those that have not are named (default: ", CheckOptions().wait, ")").c_str());
    add("save-within", po::value<std::string>()->value_name("SECONDS"),
        "how long before its end Slurm asks the job to save (its --signal): held against what a checkpoint takes at the disks' speed");
  }
  if (usage && usage->command == "watch") {
    const ProgressLimits limits;
    add("start", po::value<std::string>()->value_name("SECONDS"),
        text("the most until all ranks have done their first step, and for what is done between steps, such as validation (default: ", limits.start, ")").c_str());
    add("step", po::value<std::string>()->value_name("SECONDS"), text("the most that a later step may take (default: ", limits.step, ")").c_str());
    add("checkpoint", po::value<std::string>()->value_name("SECONDS"),
        text("the most that writing a checkpoint may take (default: ", limits.checkpoint, ")").c_str());
  }
  if (usage && usage->command == "sweep") {
    add("dry-run", po::bool_switch(), "plan every arm and leave; nothing is written");
    add("arm", po::value<std::string>()->value_name("N"), "only arm N, as the plan counts them: for the jobs of an array");
    add("run-file", po::bool_switch(), "print the path of the run file of --arm N and leave");
    add("slurm", po::bool_switch(), "submit slurm/sweep.sbatch as an array, one job an arm, instead of running here");
  }
  if (usage && usage->command == "export") {
    add("dtype", po::value<std::string>()->value_name("DTYPE"), "bf16, fp16 or fp32 (default: the source model's)");
    add("max-shard-size", po::value<std::string>()->value_name("SIZE"),
        "largest safetensors file, such as 500MB (default: 5GB)");
    add("dense", po::bool_switch(),
        "merge the experts of an upcycled model back into dense feed-forwards: the mean over copies, without routers");
  }
  if (usage && usage->command == "evaluate") {
    add("data", po::value<std::string>()->value_name("PREFIX"),
        "token files to evaluate on: PREFIX.bin and PREFIX.idx (default: the run's validation)");
    add("batches", po::value<std::string>()->value_name("N"), "global batches to evaluate on (default: validate.batches)");
  }
  if (usage && usage->command == "sample") add_sample_options(options);
  const bool sample = usage && usage->command == "sample";
  if (sample || (usage && usage->command == "inspect")) {
    add("tokenizer", po::value<std::string>()->value_name("DIR"),
        sample ? "directory of a tokenizer.json (default: the model's)" : "directory of a tokenizer.json: token files are shown as text");
  }
  if (usage && usage->command == "inspect") {
    add("tensors", po::bool_switch(), "every tensor in a line of its own, instead of one line for those of all layers");
  }
  if (usage && usage->command != "watch" && usage->command != "train") add("json", po::bool_switch(), "print JSON to standard output");
  if (usage)
    add("log-level", po::value<std::string>()->default_value("info")->value_name("LEVEL"),
        "debug (also: groups of ranks, buckets of gradients), info, warning, error or off");
  add("help", po::bool_switch(), "show this page and leave");
  if (!usage)
    add("version", po::bool_switch(), "show the versions of the program, its libraries and transports, and leave");
  return options;
}

std::string page(const po::options_description& options) {
  std::ostringstream out;
  out << options;
  return out.str();
}

std::string arguments_of(const Usage& usage) {
  std::string out;
  for (const std::string& argument : usage.arguments) out += " " + argument;
  return out + (usage.further ? " [" + *usage.further + "]" : "");
}

std::string general_help() {
  std::string out =
      "upcycle: a dense Qwen3 checkpoint becomes a Mixture-of-Experts model and trains on.\n\n"
      "Usage: upcycle COMMAND ARGUMENTS [options]      upcycle COMMAND --help      upcycle --version\n\nCommands\n";
  for (const Usage& usage : usages()) {
    std::string line = "  " + usage.command;
    line += arguments_of(usage);
    line.resize(std::max<size_t>(line.size() + 2, 32), ' ');
    out += line + usage.summary + "\n";
  }
  return out + "\nExample\n  upcycle plan configs/qwen3-14b-64e.toml\n\n" +
         "Exit codes: 0 done, 1 a fault, 2 a mistake in what was asked for, 75 stopped on request and saved (run it "
         "again)\n";
}

std::string help_for(const Usage& usage) {
  return text("Usage: upcycle ", usage.command, arguments_of(usage), " [options]\n\n", usage.summary, ".\n", usage.details,
              "\n\n", page(options_of(&usage)), "\nExample\n  ", usage.example, "\n");
}

std::string takes(const Usage& usage) {
  return text("upcycle ", usage.command, arguments_of(usage), "; see upcycle ", usage.command, " --help");
}

[[noreturn]] void unknown_option(const std::string& option, const po::options_description& options,
                                 const Usage* usage) {
  std::vector<std::string> names;
  for (const auto& known : options.options()) names.push_back("--" + known->long_name());
  const std::string name = option.substr(0, option.find('='));
  fail("unknown option '", name, "'", did_you_mean(name, names), " (", usage ? takes(*usage) : "see upcycle --help",
       ")");
}

/// Boost's parse of `words`; positional words, and those that --set took although they are no key=value, come back in
/// order.
po::variables_map parse_options(const std::vector<std::string>& words, const po::options_description& options,
                                const Usage* usage, std::vector<std::string>& positional) {
  namespace style = po::command_line_style;
  po::variables_map values;
  try {
    auto parsed = po::command_line_parser(words)
                      .options(options)
                      .style(style::unix_style & ~style::allow_guessing)
                      .allow_unregistered()
                      .run();
    for (auto& option : parsed.options) {
      if (option.unregistered && option.position_key < 0) unknown_option(option.original_tokens.at(0), options, usage);
      if (option.position_key >= 0) {
        positional.insert(positional.end(), option.value.begin(), option.value.end());
      } else if (option.string_key == "set") {
        std::vector<std::string> assignments(option.value.begin(), option.value.begin() + 1);
        for (auto word = option.value.begin() + 1; word != option.value.end(); ++word) {
          (word->find('=') == std::string::npos ? positional : assignments).push_back(*word);
        }
        option.value = assignments;
      }
    }
    std::erase_if(parsed.options, [](const auto& option) { return option.position_key >= 0; });
    po::store(parsed, values);
  } catch (const po::error& error) {
    fail(error.what(), " (", usage ? takes(*usage) : "see upcycle --help", ")");
  }
  return values;
}

CheckOptions check_options(const po::variables_map& values) {
  CheckOptions options{.files_only = values["files-only"].as<bool>()};
  if (values.count("print")) options.print = values["print"].as<std::string>();
  if (values.count("bandwidth-floor")) {
    options.bandwidth_floor = positive_number(values["bandwidth-floor"].as<std::string>(), "--bandwidth-floor", "a positive number of GB/s");
  }
  if (values.count("wait")) options.wait = positive_number(values["wait"].as<std::string>(), "--wait", "a positive number of seconds");
  if (values.count("save-within")) {
    options.save_within = positive_number(values["save-within"].as<std::string>(), "--save-within", "a positive number of seconds");
  }
  const bool on_all_ranks = options.bandwidth_floor > 0 || values.count("wait") || options.save_within;
  if (options.files_only + options.print.has_value() + on_all_ranks > 1) {
    fail("--files-only, --print, and the check on all ranks (--bandwidth-floor, --wait, --save-within) are three different things: give one of them");
  }
  if (options.files_only && values["json"].as<bool>()) fail("--files-only says only what is wrong: it has no --json");
  return options;
}

Arguments without_command(const std::vector<std::string>& words) {
  std::vector<std::string> positional;
  const auto values = parse_options(words, options_of(nullptr), nullptr, positional);
  if (values["version"].as<bool>()) return {.command = "version", .output = version_page()};
  if (values["help"].as<bool>()) return {.command = "help", .output = general_help()};
  fail("a command is missing: plan, convert, train, check, watch, sweep, export, inspect, verify, sample or evaluate; see upcycle --help");
}

}  // namespace

Arguments parse_arguments(int argc, const char* const* argv) {
  std::vector<std::string> words(argv + (argc > 0), argv + argc);
  if (words.empty() || words.front().starts_with('-')) return without_command(words);

  const Usage* usage = nullptr;
  std::vector<std::string> commands;
  for (const Usage& each : usages()) {
    commands.push_back(each.command);
    if (each.command == words.front()) usage = &each;
  }
  if (words.front() == "help") return {.command = "help", .output = general_help()};
  if (usage == nullptr)
    fail("unknown command '", words.front(), "'", did_you_mean(words.front(), commands), " (see upcycle --help)");
  words.erase(words.begin());

  Arguments arguments{.command = usage->command};
  const auto values = parse_options(words, options_of(usage), usage, arguments.positional);
  if (values["help"].as<bool>()) return {.command = "help", .output = help_for(*usage)};
  if (arguments.positional.size() < usage->arguments.size()) {
    fail(usage->arguments[arguments.positional.size()], " is missing: ", takes(*usage));
  }
  const size_t most = usage->arguments.size() + usage->further.has_value();
  if (arguments.positional.size() > most) fail("'", arguments.positional[most], "' is one argument too many: ", takes(*usage));
  if (values.count("set")) arguments.set = values["set"].as<std::vector<std::string>>();
  if (usage->command == "train") {
    arguments.accept_changes = values["accept-changes"].as<bool>();
    if (values.count("profile")) arguments.profile = values["profile"].as<std::string>();
    if (values.count("profile") && arguments.profile.empty()) fail("--profile: name the file of the trace");
  }
  if (usage->command == "sweep") {
    arguments.dry_run = values["dry-run"].as<bool>();
    arguments.run_file = values["run-file"].as<bool>();
    arguments.slurm = values["slurm"].as<bool>();
    if (values.count("arm")) arguments.arm = number<int64_t>(values["arm"].as<std::string>(), "--arm", "a number from 0 on", [](int64_t n) { return n >= 0; });
  }
  if (usage->command == "check") arguments.check = check_options(values);
  if (usage->command == "watch") {
    const auto seconds = [&](const char* name, double& limit) {
      if (values.count(name)) limit = positive_number(values[name].as<std::string>(), text("--", name), "a positive number of seconds");
    };
    seconds("start", arguments.watch.start), seconds("step", arguments.watch.step), seconds("checkpoint", arguments.watch.checkpoint);
  }
  if (values.count("ranks")) arguments.ranks = positive_integer(values["ranks"].as<std::string>(), "--ranks");
  if (values.count("gpu-memory")) arguments.gpu_memory = values["gpu-memory"].as<std::string>();
  if (values.count("dtype")) arguments.dtype = values["dtype"].as<std::string>();
  if (values.count("max-shard-size")) arguments.max_shard_size = values["max-shard-size"].as<std::string>();
  if (values.count("dense")) arguments.dense = values["dense"].as<bool>();
  if (values.count("tokenizer")) arguments.tokenizer = values["tokenizer"].as<std::string>();
  if (values.count("data")) arguments.data = values["data"].as<std::string>();
  if (values.count("batches")) arguments.batches = positive_integer(values["batches"].as<std::string>(), "--batches");
  if (usage->command == "sample") arguments.sample = sample_options(values);
  if (values.count("tensors")) arguments.tensors = values["tensors"].as<bool>();
  if (values.count("json")) arguments.json = values["json"].as<bool>();
  arguments.level = log::level_from_name(values["log-level"].as<std::string>());
  return arguments;
}

}  // namespace upcycle
