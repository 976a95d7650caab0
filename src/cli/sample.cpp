#include <chrono>
#include <fstream>
#include <iostream>
#include <nlohmann/json.hpp>

#include "base/error.hpp"
#include "base/text_file.hpp"
#include "base/watchdog.hpp"
#include "cli/command.hpp"
#include "cli/or_abort.hpp"
#include "cli/sample_report.hpp"
#include "device/device.hpp"
#include "parallel/mesh.hpp"
#include "train/agreement.hpp"
#include "train/dense_source.hpp"
#include "train/generate.hpp"
#include "train/tokenizer.hpp"

namespace upcycle {
namespace {

namespace fs = std::filesystem;
using nlohmann::ordered_json;

std::string prompt_of(const SampleOptions& options) {
  if (options.prompt && options.prompt_file) fail("--prompt and --prompt-file are both given: one prompt is gone on with");
  if (!options.prompt && !options.prompt_file) fail("no prompt: --prompt TEXT or --prompt-file FILE says what to go on with");
  if (options.prompt) return *options.prompt;
  return while_doing("--prompt-file", [&] { return text_of(*options.prompt_file); });
}

// The same directory on all ranks, though a run that goes on may bring a newer step at any moment.
WeightSource open_model(const Communicator& world, const std::string& path) {
  std::optional<WeightSource> source;
  std::string folder;
  world.together([&] {
    if (world.rank() != 0) return;
    if (!fs::is_directory(path)) {
      fail(path, ": no such directory; CHECKPOINT is a step directory, a run directory or a Hugging Face directory");
    }
    source.emplace(path);
    source->check();
    folder = source->folder().string();
  });
  folder = world.broadcast(folder, 0);
  if (world.size() > 1) agree(world, "the model", facts_of_directory("CHECKPOINT", folder));
  world.together([&] {
    if (!source) source.emplace(folder);
  });
  return std::move(*source);
}

// Everything that can be wrong with text and tokens.
GenerationRequest request_of(const SampleOptions& options, const std::string& prompt, const WeightSource& source, Tokenizer& tokenizer) {
  const Architecture& model = source.architecture();
  if (tokenizer.vocabulary() > model.vocab) {
    fail("the tokenizer knows ids up to ", tokenizer.vocabulary() - 1, ", but the model's vocabulary has ", model.vocab,
         ": it is another model's tokenizer; --tokenizer DIR names the right one");
  }
  if (prompt.empty()) fail("the prompt is empty");
  GenerationRequest request;
  request.prompt = tokenizer.encode(prompt);
  if (request.prompt.empty()) fail("the prompt has no tokens");
  const auto length = static_cast<int64_t>(request.prompt.size());
  if (length >= model.max_positions) {
    fail("the prompt has ", length, " tokens, but the model has max_position_embeddings = ", model.max_positions,
         ", and one at least is to be said: shorten it");
  }
  request.tokens = options.tokens;
  request.choice = {options.temperature, options.top_p};
  request.seed = options.seed;
  request.ends = end_tokens(source.is_checkpoint() ? source.folder() / "tokenizer" : source.folder(), source.config());
  request.routing = options.routing;
  return request;
}

}  // namespace

int run_sample(const Arguments& arguments) {
  const SampleOptions& options = arguments.sample;
  const Communicator world = Communicator::everyone();
  const Watchdog watchdog(world.rank(), gather_processes(world), 600, nccl::abort_all);   // 1. nobody waits for the dead
  const WeightSource source = open_model(world, arguments.positional.at(0));              // 2. read and check everything
  std::optional<Tokenizer> tokenizer;
  std::string prompt;
  GenerationRequest request;
  at::Device device = at::kCPU;
  world.together([&] {
    device = device::choose(options.device, host_rank());
    device::set_tf32(false);
    if (world.rank() != 0) return;
    prompt = prompt_of(options);
    tokenizer.emplace(arguments.tokenizer.value_or((source.is_checkpoint() ? source.folder() / "tokenizer" : source.folder()).string()));
    request = request_of(options, prompt, source, *tokenizer);
  });
  const Architecture& model = source.architecture();
  Mesh mesh(Grid(generation_layout(model, world.size()), world.size()));                  // 3. experts over the ranks
  mesh.prepare(device, Transport::automatic);
  const int working = mesh.grid().size(Axis::expert);
  if (working < world.size() && world.rank() == 0) {
    log::warning(text(working, " of ", world.size(), " ranks work: ",
                      model.is_moe() ? text(model.experts, " experts do not divide over more of them") : "a dense model has no experts to spread"));
  }
  const bool exact = !device.is_cuda() || model.dtype == at::kFloat;
  nlohmann::json routers;
  if (source.is_checkpoint()) routers = read_manifest(source.folder()).training.value("routers", nlohmann::json());
  or_abort_nccl([&] {
    const Fill fill = as_they_are([&](const std::string& name, const Box& box) { return source.read(name, box); });
    Generator generator(model, fill, routers, mesh, device, exact ? at::kFloat : at::kBFloat16);
    ordered_json all = {{"model", source.folder().string()},
                        {"prompt", prompt},
                        {"prompt_tokens", request.prompt},
                        {"temperature", options.temperature},
                        {"top_p", options.top_p},
                        {"seed", options.seed},
                        {"samples", ordered_json::array()}};
    for (int sample = 0; sample < options.samples; ++sample) {                            // 4. one text after the other
      if (world.rank() != 0) {
        generator.generate({}, sample, {});
        continue;
      }
      if (!arguments.json && options.samples > 1) std::cout << "--- sample " << sample + 1 << " of " << options.samples << "\n";
      if (!arguments.json) std::cout << prompt << std::flush;
      Telling telling(*tokenizer, request, !arguments.json);
      const auto start = std::chrono::steady_clock::now();
      const Ending ending = generator.generate(request, sample, [&](const GeneratedToken& token) { telling.tell(token); });
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      all["samples"].push_back(telling.end(ending));
      if (arguments.json) continue;
      std::cout << std::endl;
      if (options.routing) print_routing(telling.tokens(), *tokenizer);
      log::info(text(telling.tokens().size(), " tokens in ", seconds, " s; ended by ", name(ending)));
    }
    if (arguments.json && world.rank() == 0) std::cout << all.dump(2) << std::endl;
    return 0;
  });
  world.barrier();
  return kExitDone;
}

}  // namespace upcycle
