#pragma once
#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace upcycle {

/// A run as its user describes it: one TOML file, the same words. Defaults here are the defaults of the program.
/// How each field is read, checked and written is said once, in fields.cpp (`describe`).

enum class Transport { automatic, nccl, mpi };
struct RunSection {
  std::string name = "run";
  std::string directory;               ///< default: runs/<name>
  int64_t seed = 1234;
  std::string timeout = "10min";       ///< number with s, min or h
  Transport transport = Transport::automatic;
  std::string device = "auto";         ///< auto | cpu | cuda
  bool share_gpu = false;              ///< several ranks on one GPU: refused unless asked for
  std::string signal = "USR2";         ///< asks for "save and leave with code 75"; TERM always does, too
};

struct SourceSection {
  std::string model;                   ///< Hugging Face directory or checkpoint of ours
  std::vector<std::string> models;     ///< several of one shape, instead of `model`: experts of each, the mean of all else
  std::vector<int64_t> quotas;         ///< of each model, how many of the copies are its own; default: spread evenly
  std::string architecture;            ///< config.json; alone: random initialisation
  /// `model` or `models`, whichever is given; empty for a random start.
  std::vector<std::string> all() const { return model.empty() ? models : std::vector<std::string>{model}; }
  std::string tokenizer;               ///< directory; default: the model's
};

enum class Dispatch { automatic, all_to_all, all_gather };
struct MoeSection {
  int64_t experts = 0;                 ///< N; 0: no experts asked for
  int64_t top_k = 2;                   ///< K
  int64_t granularity = 1;             ///< G
  bool pre_softmax = false;            ///< weights are softmax probabilities over all experts, not renormalised
  std::string layers_text = "all";     ///< "all", "every:2", "first-dense:1", or a list "[0, 1, 2]" of MoE layers
  Dispatch dispatcher = Dispatch::automatic;
  double max_parameters = 140e9;
};

enum class Scaling { exact, cube_root, none };
enum class UnitOrder { identity, random, clusters };
enum class DropIndices { shared, per_matrix };
enum class Moments { reset, copy, scaled };
struct UpcycleSection {
  Scaling scaling = Scaling::exact;
  UnitOrder permutation = UnitOrder::identity;   ///< of a feed-forward's hidden units, before it is cut
  double router_logit_std = 1.4;
  double noise = 0.0;
  double drop = 0.0;
  DropIndices drop_indices = DropIndices::shared;
  Moments optimizer = Moments::reset;  ///< what becomes of the Adam moments of a source that has them
  bool certify = true;
  int64_t certify_tokens = 512;        ///< tokens of the function-level certificate
};

enum class Precision { bf16, fp32 };
enum class Recompute { none, selective, full };
enum class NanPolicy { skip, stop };
struct TrainSection {
  int64_t steps = 1000;
  int64_t sequence = 4096;
  int64_t global_batch = 128;          ///< sequences per step over all ranks
  int64_t micro_batch = 1;             ///< sequences at a time on one rank
  Precision precision = Precision::bf16;
  Recompute recompute = Recompute::none;
  bool deterministic = false;          ///< on a GPU, too, the same start makes the same bits; attention's backward is slower
  NanPolicy nan_policy = NanPolicy::skip;
  int64_t nan_limit = 10;              ///< skipped steps in a row after which the run rolls back, or stops
  double spike = 0.0;                  ///< a loss so many standard deviations above its recent mean is skipped, too; 0: none. See LossSpikes
  int64_t rollbacks = 3;               ///< the most that one start rolls back before it stops
  int64_t check_replicas = 0;          ///< steps between comparisons of parameters that several ranks hold; 0: never
};

enum class Schedule { constant, linear, cosine, inverse_sqrt, wsd };
struct OptimizerSection {
  double lr = 1e-4;
  double min_lr = 0.0;
  Schedule schedule = Schedule::cosine;
  int64_t warmup = 0;                  ///< steps
  int64_t decay = 0;                   ///< wsd: steps of the final descent
  double weight_decay = 0.1;
  std::array<double, 2> betas = {0.9, 0.95};
  double eps = 1e-8;
  double clip = 1.0;                   ///< 0: no clipping
  std::optional<double> router_lr_scale;  ///< default 0.1 for granularity > 1, else 1
};

enum class DropPolicy { weight, position };
enum class BalanceScope { batch, sequence, global };
struct BalanceSection {
  double aux = 1e-3;
  BalanceScope scope = BalanceScope::batch;   ///< over what choices experts are to be in balance, see moe/balance_loss.hpp
  double z = 0.0;
  double bias_rate = 0.0;              ///< 0: a bias that a checkpoint has stays as it is
  double jitter = 0.0;
  double capacity_factor = 0.0;        ///< 0: dropless
  DropPolicy drop_policy = DropPolicy::weight;
  bool pad_to_capacity = false;
};

struct Blend {
  double weight = 1.0;
  std::string prefix;                  ///< prefix of .bin/.idx, or "mock"
  bool operator==(const Blend&) const = default;
};
enum class Borders { concatenated, packed };
struct DataSection {
  std::vector<Blend> train;            ///< [[weight, prefix], ...]
  std::vector<Blend> validation;       ///< empty: the second share of `split`
  std::array<int64_t, 3> split = {99990, 8, 2};
  Borders documents = Borders::concatenated;   ///< packed: attention stays inside a document
  std::optional<int64_t> seed;         ///< of the order of the data; default: run.seed
  double epochs = 0.0;                 ///< the most passes over any data set of `train`, 1.5 say; 0: no limit
};

struct ParallelSection {
  int64_t tensor = 1;
  int64_t context = 1;
  int64_t pipeline = 1;
  int64_t virtual_stages = 1;          ///< chunks of layers on each stage
  bool count_embedding = false;        ///< the embedding counts as a layer where layers are spread over stages
  bool count_loss = false;             ///< so does the head with the loss
  std::vector<int64_t> layout;         ///< "3|4|4|3": layers of each chunk in the model's order; empty: spread evenly
  int64_t expert = 1;
  int64_t expert_tensor = 1;
  int64_t zero = 1;
};

struct CheckpointSection {
  int64_t every = 500;
  int64_t keep = 3;
  int64_t keep_every = 0;
  bool keep_best = false;              ///< the one with the lowest validation loss stays, too
  bool asynchronous = false;           ///< written behind the steps
  std::string transfer = "auto";       ///< how bytes reach the files: checkpoint/block_file.hpp
  double file_size = 64.0;             ///< GB of tensors beyond which one kind of them is divided among several files
};

struct ValidateSection {
  int64_t every = 0;                   ///< 0: never
  int64_t batches = 20;                ///< of global_batch sequences
};

struct LogSection {
  int64_t every = 10;
  bool tensorboard = false;            ///< event files beside metrics.jsonl, in <run.directory>/tensorboard
  int64_t experts_every = 100;         ///< steps between looks at the experts, see train/expert_health.hpp; 0: never
};

struct RunConfig {
  RunSection run;
  SourceSection source;
  MoeSection moe;
  UpcycleSection upcycle;
  TrainSection train;
  OptimizerSection optimizer;
  BalanceSection balance;
  DataSection data;
  ParallelSection parallel;
  CheckpointSection checkpoint;
  ValidateSection validate;
  LogSection log;

  bool moe_given = false;              ///< a [moe] section is there
  std::map<std::string, std::string> origins;  ///< "train.steps" -> "default", "run.toml:12" or "--set"

  /// Granularity > 1 wants a slow router (Upcycle's own retest of the "untie shock"); see README.
  double router_lr_scale() const { return optimizer.router_lr_scale.value_or(moe.granularity > 1 ? 0.1 : 1.0); }
  int64_t data_seed() const { return data.seed.value_or(run.seed); }
  double timeout_seconds() const;
};

/// Reads a run file, applies `--set key=value` overrides, checks every value by itself (kind, range, choices).
/// Throws UserError listing all problems at once, each with file, line and column, unknown keys with a suggestion.
RunConfig read_run(const std::string& path, const std::vector<std::string>& overrides = {});

/// Reads a run from TOML text (tests, and the resolved run in a checkpoint). `name` stands for the file in messages.
RunConfig parse_run(const std::string& toml, const std::string& name, const std::vector<std::string>& overrides = {});

/// The resolved run: every key with its value, as TOML that read_run accepts; a comment says `default`, `file` or `--set`.
std::string to_toml(const RunConfig&);

/// The same as JSON text, {"run": {"name": ...}, ...}, for `plan --json` and manifests.
std::string to_json(const RunConfig&);

/// The run that a manifest tells of, as to_json wrote it: keys that it lacks have their defaults, those that are not known any more are
/// left out. Throws UserError, with `where` in front, for a value that can't be one of its key.
RunConfig run_from_json(const std::string& json, const std::string& where);

}  // namespace upcycle
