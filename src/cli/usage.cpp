#include "cli/usage.hpp"

namespace upcycle {

const std::vector<Usage>& usages() {
  static const std::vector<Usage> all = {
      {"plan",
       {"RUN.toml"},
       true,
       "what a run would be: parameters, memory, messages, FLOPs, checkpoints; touches no weights",
       "Names what does not divide, and the nearest that would, and prints the resolved run: every key with its value and where that comes\n"
       "from. Needs no weights where source.architecture names a config.json. Runs without mpirun.\n"
       "Exit code 2 when the run can't be done as it is, or does not fit the --gpu-memory that was given.",
       "upcycle plan configs/qwen3-14b-64e.toml --ranks 64 --gpu-memory 80GB --set moe.top_k=16"},
      {"convert",
       {"RUN.toml"},
       true,
       "a Hugging Face directory becomes a checkpoint, with experts where the run asks for them",
       "Writes step 0 into run.directory, in the checkpoint format of train: with the experts of [moe], grown as train grows them, or,\n"
       "with moe.experts = 0, source.model as it is. Any number of ranks, whatever [parallel] says. Needs the memory of a few blocks, whatever\n"
       "the model's size. After an interruption the same command goes on.",
       "mpirun -n 4 upcycle convert configs/qwen3-0.6b-8e.toml"},
      {"train",
       {"RUN.toml"},
       true,
       "trains; upcycles on the fly; resumes by itself",
       "A dense source with experts asked for in [moe] is upcycled and stored as step 0 first. When run.directory "
       "holds a valid\n"
       "checkpoint, the run goes on from the newest, on any number of ranks; keys that change what is computed must be "
       "those of that\n"
       "checkpoint, or accepted as changed. On run.signal (USR2) or TERM it saves and leaves with exit code 75: run the "
       "same command\n"
       "again. Files in run.directory: make `save` for a checkpoint within a few steps (the run removes it when that is there), `stop` to\n"
       "save and leave (and not to start again while it is there); the run writes `finished` when all steps are done.",
       "mpirun -n 4 upcycle train configs/quickstart.toml --set train.steps=200"},
      {"check",
       {"RUN.toml"},
       true,
       "can this run start here, and are these nodes in order: a table, before anything is written",
       "Started like train, on all ranks: where each rank runs, its CPUs and GPU, the nodes' memory and disk, the bandwidth between neighbouring\n"
       "nodes and of an all-reduce, space for the checkpoints, all inputs on every node, time for a save before Slurm ends the job; all within\n"
       "half a minute. Token ids are not read. What is wrong is told with the node's name; what may be meant so is a note. Exit code 2 when\n"
       "train should not be started, 1 when ranks do not come: these are named.\n"
       "--files-only and --print run without MPI, in a job's script before srun: --files-only checks run file, source, tokenizer, data and run\n"
       "directory from here, and says nothing when all is well.",
       "srun --mpi=pmix upcycle check configs/qwen3-14b-64e.toml --bandwidth-floor 10"},
      {"watch",
       {"RUN_DIRECTORY"},
       false,
       "waits beside a run, and says when it hangs and whom it waits for",
       "Looks at the heartbeats that a run's ranks write into RUN_DIRECTORY, which need not be there yet; those of earlier starts do not count.\n"
       "Only durations by the watcher's own clock are compared. Exit code 0: the run has left, well or not (srun says which); 1: a limit has\n"
       "passed, with one line that names the ranks, hosts and processes; it ends nothing by itself. Started before the run, it needs no MPI.",
       "upcycle watch runs/quickstart/e8 --start 1800 --step 300 --checkpoint 900"},
      {"sweep",
       {"SWEEP.toml"},
       false,
       "trains many variants of a run, to compare them: plans, runs and resumes its arms",
       "A sweep file names a base run file, the keys in which its arms differ, and a dense control. Every arm is planned "
       "first; those that\n"
       "can't run are named and left out. Each has its own run directory in sweep.directory; asked again, the command "
       "does what is not\n"
       "finished. USR2 or TERM stops and saves (exit code 75: run it again). tools/report compares the arms, while they "
       "run, too.",
       "upcycle sweep configs/sweeps/experts.toml --dry-run"},
      {"export",
       {"CHECKPOINT", "DIRECTORY"},
       false,
       "a checkpoint becomes a Hugging Face directory",
       "CHECKPOINT is a step directory, or a run directory (its newest valid step). Writes sharded safetensors, "
       "config.json,\n"
       "tokenizer and generation files that transformers and vLLM read. DIRECTORY must be new or empty. Any number of ranks; after an\n"
       "interruption the same command goes on. Refuses what Hugging Face's qwen3_moe can't express: a router's balancing bias\n"
       "(balance.bias_rate), and a capacity (balance.capacity_factor).",
       "upcycle export runs/quickstart/e8 exported/quickstart-e8"},
      {"inspect",
       {"CHECKPOINT|DATA"},
       false,
       "what is in a checkpoint, or in token files; what differs between two checkpoints",
       "CHECKPOINT is a step directory, or a run directory (its newest valid step). With a second one: what differs in step, settings,\n"
       "architecture, recipe and source, and which tensors by how much. Exit code 0: nothing; 1: something; 2: they can't be compared.\n"
       "What a run is called and the layout that wrote it are told, and are no difference.\n"
       "DATA is what Megatron's .bin and .idx have in common: \"text\" stands for text.bin and text.idx. Lengths of all documents; the\n"
       "first documents as text where --tokenizer names one, else as ids; the share of tokens that are learned where text.mask.idx is\n"
       "there.",
       "upcycle inspect runs/quickstart/e8/checkpoints/step-00000080 runs/quickstart/e8 --tensors",
       "OTHER"},
      {"verify",
       {"CHECKPOINT"},
       false,
       "is a checkpoint whole, and what it claims to be",
       "Reads all of it and holds every block against its checksum, names, shapes and dtypes against the architecture, all of that against\n"
       "the manifest; asks the certificate. Several ranks share the reading. Exit code 0: it is; 1: it is not; 2: this cannot be judged.",
       "mpirun -n 4 upcycle verify runs/quickstart/e8"},
      {"sample",
       {"CHECKPOINT"},
       false,
       "a model goes on with a prompt",
       "CHECKPOINT is a step directory, a run directory (its newest valid step) or a Hugging Face directory; dense or MoE. Prints\n"
       "prompt and continuation as it comes, up to the model's end token. On several ranks the experts are spread over as many as\n"
       "divide their number; the text is the same on any number.",
       "mpirun -n 4 upcycle sample runs/quickstart/e8 --prompt \"def main():\" --temperature 0.8 --top-p 0.95 --samples 3"},
      {"evaluate",
       {"RUN.toml"},
       true,
       "validation loss of a run's source and checkpoints, on the same data",
       "Of the dense source, of step 0 where it is there, and of the newest checkpoint of run.directory; on the layout of the run\n"
       "file. Writes nothing, and may be used while the run goes on.",
       "mpirun -n 4 upcycle evaluate configs/quickstart.toml"},
  };
  return all;
}

}  // namespace upcycle
