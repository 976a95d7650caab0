#include "train/agreement.hpp"

#include <xxhash.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iomanip>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>

#include "base/error.hpp"
#include "checkpoint/manifest.hpp"

namespace upcycle {

namespace fs = std::filesystem;

namespace {

constexpr int64_t kSample = 64 << 10, kSamples = 16, kWhole = int64_t{1} << 40;

/// A digest of all of a file that has at most `small` bytes; of a larger one, of samples from its beginning to its end.
std::string fingerprint(const fs::path& path, int64_t small = kSample * kSamples) {
  std::error_code none;
  const auto size = static_cast<int64_t>(fs::file_size(path, none));
  std::ifstream file(path, std::ios::binary);
  if (none || !file) return "can't be read";
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> digest(XXH3_createState(), &XXH3_freeState);
  XXH3_64bits_reset(digest.get());
  std::string sample(kSample, '\0');
  const int64_t samples = size <= small ? (size + kSample - 1) / kSample : kSamples;
  for (int64_t i = 0; i < samples; ++i) {
    file.seekg(size <= small ? i * kSample : i * (size - kSample) / (kSamples - 1));
    file.read(sample.data(), kSample);
    XXH3_64bits_update(digest.get(), sample.data(), static_cast<size_t>(file.gcount()));
  }
  return text(size, " bytes, digest ", std::hex, std::setfill('0'), std::setw(16), XXH3_64bits_digest(digest.get()));
}

Facts facts_of_data(const std::string& key, const std::vector<Blend>& blend) {
  Facts facts;
  for (const Blend& part : blend) {
    if (part.prefix == "mock") continue;
    for (const char* ending : {".idx", ".bin", ".mask.idx", ".mask.bin"}) {
      const std::string file = part.prefix + ending;
      facts.emplace_back(text(key, ", ", file), fingerprint(file));
    }
  }
  return facts;
}

Facts facts_of(const RunConfig& config) {
  Facts facts;
  const auto settings = nlohmann::ordered_json::parse(to_json(config));
  for (const auto& [section, keys] : settings.items()) {
    for (const auto& [key, value] : keys.items()) facts.emplace_back(section + "." + key, value.dump());
  }
  const auto add = [&](Facts more) { facts.insert(facts.end(), more.begin(), more.end()); };
  for (const std::string& model : config.source.all()) {
    const auto checkpoint = newest_checkpoint(model);
    add(facts_of_directory(config.source.models.empty() ? "source.model" : "source.models", checkpoint.value_or(model)));
  }
  if (!config.source.tokenizer.empty()) add(facts_of_directory("source.tokenizer", config.source.tokenizer));
  if (!config.source.architecture.empty())
    facts.emplace_back("source.architecture, " + config.source.architecture, fingerprint(config.source.architecture));
  add(facts_of_data("data.train", config.data.train));
  add(facts_of_data("data.validation", config.data.validation));
  return facts;
}

/// One line for each fact in which two ranks differ, rank 0's order.
std::vector<std::string> differences(const Facts& first, const Facts& other, int rank) {
  const std::map<std::string, std::string> here(first.begin(), first.end()), there(other.begin(), other.end());
  std::vector<std::string> lines;
  const auto compare = [&](const std::string& what) {
    const auto a = here.find(what), b = there.find(what);
    const std::string one = a == here.end() ? "absent" : a->second, two = b == there.end() ? "absent" : b->second;
    if (one != two) lines.push_back(text(what, ": ", one, " on rank 0, ", two, " on rank ", rank));
  };
  for (const auto& [what, value] : first) compare(what);
  for (const auto& [what, value] : other) {
    if (!here.contains(what)) compare(what);
  }
  return lines;
}

}  // namespace

Facts facts_of_directory(const std::string& key, const fs::path& directory) {
  std::set<fs::path> files;
  std::error_code none;
  for (const auto& entry : fs::directory_iterator(directory, none)) {
    if (entry.is_regular_file(none)) files.insert(entry.path());
  }
  if (files.empty()) return {{text(key, ", ", directory.string()), "not a directory with files"}};
  Facts facts;
  for (const fs::path& file : files) facts.emplace_back(text(key, ", ", file.string()), fingerprint(file));
  return facts;
}

void agree(const Communicator& world, const std::string& topic, const Facts& mine) {
  const std::string own = nlohmann::json(mine).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  const std::vector<int64_t> digests = world.all_gather(static_cast<int64_t>(XXH3_64bits(own.data(), own.size())));
  if (std::count(digests.begin(), digests.end(), digests.front()) == static_cast<int64_t>(digests.size())) return;
  const std::string first = world.broadcast(own, 0), host = world.broadcast(host_name(), 0);
  world.together([&] {
    if (own == first) return;
    constexpr size_t kShown = 10;
    std::vector<std::string> lines = differences(nlohmann::json::parse(first).get<Facts>(), mine, world.rank());
    const size_t more = lines.size() > kShown ? lines.size() - kShown : 0;
    lines.resize(lines.size() - more);
    std::string all;
    for (const std::string& line : lines) all += "\n  " + line;
    if (more > 0) all += text("\n  and ", more, " more");
    const auto others = std::count_if(digests.begin(), digests.end(), [&](int64_t digest) { return digest != digests.front(); }) - 1;
    fail("its host ", host_name(), " sees ", topic, " otherwise than rank 0's host ", host,
         others > 0 ? text(" (and so do ", others, " other ranks)") : "", ":", all, "\nAll ranks must see the same");
  });
}

std::optional<LaunchedRanks> launched_ranks() {
  // The launcher that is nearest speaks: mpirun inside of a Slurm step says OMPI_COMM_WORLD_SIZE. SLURM_NTASKS is that of the job, and a
  // batch script may start one process by itself.
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"}) {
    if (const char* value = std::getenv(name)) return LaunchedRanks{std::atoi(value), name};
  }
  return {};
}

void check_world_size(int world) {
  const auto launched = launched_ranks();
  if (!launched || launched->ranks <= 1 || world == launched->ranks) return;
  fail("the launcher started ", launched->ranks, " ranks (", launched->variable, " = ", launched->ranks, "), but MPI sees ", world, ": they would be ",
       world == 1 ? text(launched->ranks, " jobs of one rank each") : "several jobs", ". Start them by this MPI's own mpirun, or by srun --mpi=pmix ",
       "(srun --mpi=list shows what there is)");
}

void check_whole_job(const std::string& command, int world) {
  if (command != "train" && command != "check") return;
  // In a step, SLURM_NTASKS is the step's: under mpirun, of its daemons. Only the job's script and shell have no SLURM_STEP_NUM_TASKS.
  if (!std::getenv("OMPI_COMM_WORLD_SIZE") || !std::getenv("SLURM_JOB_ID") || std::getenv("SLURM_STEP_NUM_TASKS")) return;
  const char* value = std::getenv("SLURM_NTASKS");
  const int tasks = value ? std::atoi(value) : 0;
  if (tasks <= 1 || tasks == world) return;
  fail("mpirun started ", world, world == 1 ? " rank" : " ranks", ", but this Slurm job has ", tasks, " tasks (SLURM_NTASKS = ", value, "): start as many (mpirun -np ",
       tasks, "), or ask Slurm for ", world, "; where ", command, " is meant to take a part of the job: env -u SLURM_NTASKS mpirun ...");
}

void agree_on_program(const Communicator& world, const std::string& command) {
  check_world_size(world.size());
  world.together([&] { check_whole_job(command, world.size()); });   // rank 0 is where mpirun is, and sees the script's environment
  if (world.size() == 1) return;
  agree(world, "the program", {{"command", command}, {"executable", fingerprint("/proc/self/exe", kWhole)}});
}

RunConfig read_agreed_run(const Communicator& world, const std::string& path, const std::vector<std::string>& overrides) {
  RunConfig config;
  world.together([&] { config = read_run(path, overrides); });
  if (world.size() == 1) return config;
  Facts facts;
  world.together([&] { facts = facts_of(config); });
  agree(world, "the run", facts);
  return config;
}

std::vector<Process> gather_processes(const Communicator& world) {
  const Process me = this_process();
  std::vector<Process> all;
  for (const std::string& line : world.all_gather(text(me.pid, ' ', me.started, ' ', me.host))) {
    Process process;
    std::istringstream(line) >> process.pid >> process.started >> process.host;
    all.push_back(process);
  }
  return all;
}

}  // namespace upcycle
