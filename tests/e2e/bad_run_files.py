"""Bad run files and bad command lines: exit code 2, one message that names file, line, column, key and what to do; nothing written.

Usage: bad_run_files.py UPCYCLE SOURCE_DIRECTORY [unittest arguments]
"""
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import unittest

from rank_server import served

PROGRAM, SOURCE = sys.argv[1], pathlib.Path(sys.argv[2])
MODELS = SOURCE / "configs" / "models"
MPIRUN = os.environ.get("UPCYCLE_MPIRUN", "mpirun --oversubscribe --bind-to none").split()

# A small dense model, and a run of it that is fine.
ARCHITECTURE = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "num_hidden_layers": 4,
                "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96, "vocab_size": 256,
                "rope_theta": 1000000, "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "torch_dtype": "float32"}
GOOD = '[run]\nname = "good"\n[source]\narchitecture = "config.json"\n[data]\ntrain = "mock"\n'


class Case(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory(prefix="upcycle-bad-run-")
        self.addCleanup(scratch.cleanup)
        self.folder = pathlib.Path(scratch.name)
        self.store("config.json", json.dumps(ARCHITECTURE))

    def store(self, name, content):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    def listing(self):
        return {str(path.relative_to(self.folder)): path.read_bytes() if path.is_file() else None for path in self.folder.rglob("*")}

    def run_program(self, *arguments, launcher=()):
        # The program must take nothing from the place where the tests run, nor leave anything there.
        return subprocess.run([*launcher, served(PROGRAM), *arguments], cwd=self.folder, capture_output=True, text=True, timeout=120)

    def refused(self, *arguments, says, launcher=()):
        """Exit code 2, every part of `says` on standard error, nothing written."""
        before = self.listing()
        result = self.run_program(*arguments, launcher=launcher)
        self.assertEqual(result.returncode, 2, f"{arguments}: {result.stderr}{result.stdout}")
        for part in says:
            self.assertIn(part, result.stderr)
        self.assertEqual(self.listing(), before, f"{arguments} wrote something")
        return result

    def refused_run(self, toml, *says, commands=("plan", "train", "convert"), arguments=()):
        self.store("run.toml", toml)
        for command in commands:
            with self.subTest(command=command, toml=toml):
                self.refused(command, "run.toml", *arguments, says=says)


class RunFiles(Case):
    def test_all_problems_in_one_report(self):
        self.refused_run('[train]\nsteps = true\nmicro_bach = 2\nsequence = 1e3\n[optimiser]\nlr = 1\n[balance]\nscope = "bach"\n',
                         "upcycle: run.toml: 6 problems",
                         "run.toml:2:9: train.steps: an integer is expected, not the boolean true",
                         "run.toml:3:1: unknown key 'train.micro_bach'; did you mean 'train.micro_batch'?",
                         "run.toml:4:12: train.sequence: an integer is expected, not the float 1000.0: write 1000",
                         "run.toml:5:2: unknown section [optimiser]; did you mean 'optimizer'?",
                         "run.toml:8:9: balance.scope: choose \"batch\", \"sequence\" or \"global\", not the string \"bach\"",
                         "run.toml: source.model: give source.model")

    def test_overrides_are_named(self):
        self.refused_run(GOOD, "--set train.stesp=3: unknown key 'train.stesp'; did you mean 'train.steps'?", "--set optimizer.lr=-1: ",
                         arguments=("--set", "train.stesp=3", "optimizer.lr=-1"))

    def test_not_toml(self):
        self.refused_run("[train]\nsteps = = 3\n", "run.toml:2:9: not TOML")

    def test_no_such_file(self):
        for command in ("plan", "train", "convert"):
            self.refused(command, "absent.toml", says=["absent.toml: cannot be opened"])

    def test_fields_against_each_other(self):
        self.refused_run(GOOD + "[train]\nglobal_batch = 8\nmicro_batch = 3\n",
                         "run.toml:9:15: train.micro_batch = 3 does not divide train.global_batch = 8: 2 or 4 would")

    def test_recipes_that_cannot_be(self):
        model = '[source]\nmodel = "/nowhere/model"\narchitecture = "config.json"\n'
        moe = model + "[moe]\nexperts = {}\ntop_k = {}\ngranularity = {}\n"
        self.refused_run(moe.format(8, 3, 4), "moe.top_k", "moe.granularity", "3 % 4", commands=["plan"])
        self.refused_run(moe.format(10, 5, 5), "intermediate_size = 96", "moe.granularity = 5", commands=["plan"])
        self.refused_run(moe.format(9, 4, 4), "moe.experts = 9 is not a multiple of moe.granularity = 4", commands=["plan"])
        self.refused_run(moe.format(8, 2, 1) + "max_parameters = 1e5\n", "more than moe.max_parameters = ", commands=["plan"])

    def test_layouts_that_do_not_divide(self):
        self.refused_run(GOOD + "[train]\nsequence = 32\nglobal_batch = 9\n[parallel]\ntensor = 3\n", "run.toml can't be trained on 6 ranks:",
                         "tensor = 3 does not divide num_attention_heads = 4: 2 or 4 would",
                         "train.global_batch = 9 is not a multiple of train.micro_batch = 1 times the 2 data-parallel ranks", "8 or 10 would do",
                         "train.sequence = 32 is not a multiple of 3 (tensor 3): 30 or 33 would be",
                         commands=["plan"], arguments=("--ranks", "6"))
        self.refused_run(GOOD + "[parallel]\npipeline = 2\nlayout = \"1|4\"\n",
                         "parallel.layout has 5 layers in 2 chunks; the model has 4 in 2 (pipeline 2 x virtual_stages 1)", commands=["plan"])
        self.refused_run(GOOD + "[parallel]\ntensor = 3\n", "tensor 3 does not divide the 8 ranks of this run: 2 or 4 would, or 6 or 9 ranks",
                         commands=["plan"], arguments=("--ranks", "8"))
        self.refused_run(GOOD + "[moe]\nexperts = 8\n[parallel]\nexpert = 6\n", "expert 6 does not divide the 8 ranks of a stage",
                         "4 or 8 would, or 6 or 12 ranks", commands=["plan"], arguments=("--ranks", "8"))
        self.refused_run(GOOD + "[moe]\nexperts = 8\n[parallel]\nexpert = 3\n", "expert = 3 does not divide num_experts = 8: 2 or 4 would",
                         commands=["plan"])
        self.refused_run(GOOD + "[moe]\nexperts = 8\n[parallel]\nexpert_tensor = 5\n",
                         "expert_tensor = 5 does not divide moe_intermediate_size = 96: 4 or 6 would", commands=["plan"])
        self.refused_run(GOOD + "[parallel]\npipeline = 5\n", "pipeline = 5 x virtual_stages = 1 makes 5 chunks for num_hidden_layers = 4", "4 is the most", commands=["plan"])
        self.refused_run(GOOD + "[parallel]\nexpert = 2\n", "expert = 2", "a dense model has no experts", commands=["plan"])
        self.refused_run(GOOD + "[parallel]\ntensor = 4096\ncontext = 4096\n", "[parallel] asks for 16777216 ranks", commands=["plan"])

    def test_architectures_that_are_not_read(self):
        for change, message in (({"model_type": "llama"}, "config.json: model_type = \"llama\": only Qwen3ForCausalLM"),
                                ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "config.json: rope_scaling.rope_type = \"yarn\""),
                                ({"attention_bias": True}, "config.json: attention_bias = true"),
                                ({"hidden_act": "gelu"}, "config.json: hidden_act = \"gelu\""),
                                ({"hidden_size": "64"}, "config.json: hidden_size = \"64\": an integer"),
                                ({"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}, "sliding windows are in use")):
            self.store("config.json", json.dumps(ARCHITECTURE | change))
            self.refused_run(GOOD, message, commands=["plan"])
        self.store("config.json", "{")
        self.refused_run(GOOD, "config.json: not valid JSON", commands=["plan"])
        (self.folder / "config.json").unlink()
        self.refused_run(GOOD, "config.json: cannot be opened", commands=["plan"])

    def test_sources_that_are_not_there_or_contradict(self):
        self.refused_run('[source]\nmodel = "absent"\n', "source.model = absent is not there", commands=["plan"])
        self.store("empty/readme.txt", "")
        self.refused_run('[source]\nmodel = "empty"\n', "source.model = empty: neither a Hugging Face directory", commands=["plan"])
        self.store("model/config.json", json.dumps(ARCHITECTURE | {"hidden_size": 128, "rope_theta": 10000}))
        self.refused_run('[source]\nmodel = "model"\narchitecture = "config.json"\n', "source.architecture = config.json is not the model",
                         "hidden_size: 64 here, 128 there", "rope_theta: 1000000.0 here, 10000.0 there", commands=["plan"])

    def test_transfers_that_contradict(self):
        self.refused_run(GOOD + '[checkpoint]\nasynchronous = true\ntransfer = "independent"\n', 'checkpoint.transfer = "independent" writes through HDF5',
                         "needs checkpoint.asynchronous = false")
        self.refused_run(GOOD + '[checkpoint]\ntransfer = "dircet"\n', "checkpoint.transfer", "direct")

    def test_several_ranks_tell_it_once(self):
        self.store("run.toml", GOOD + "[train]\nsteps = true\n")
        result = self.refused("train", "run.toml", says=["run.toml:8:9: train.steps"], launcher=[*MPIRUN, "-np", "2"])
        self.assertEqual(result.stderr.count("train.steps"), 1, result.stderr)
        result = self.refused("trian", "run.toml", says=["did you mean 'train'?"], launcher=[*MPIRUN, "-np", "2"])
        self.assertEqual(result.stderr.count("did you mean"), 1, result.stderr)


class CommandLines(Case):
    def test_mistakes(self):
        for arguments, message in (
                ([], "a command is missing: plan, convert, train, check, watch, sweep, export, inspect, verify, sample or evaluate"),
                (["trian", "run.toml"], "unknown command 'trian'; did you mean 'train'?"),
                (["plan"], "RUN.toml is missing: upcycle plan RUN.toml"),
                (["export", "runs/x"], "DIRECTORY is missing: upcycle export CHECKPOINT DIRECTORY"),
                (["verify", "a", "b"], "'b' is one argument too many"),
                (["plan", "run.toml", "--jsn"], "unknown option '--jsn'; did you mean '--json'?"),
                (["inspect", "x", "--set", "a.b=c"], "unknown option '--set'"),
                (["train", "run.toml", "--ranks", "2"], "unknown option '--ranks'"),
                (["plan", "run.toml", "--js"], "unknown option '--js'; did you mean '--json'?"),
                (["plan", "run.toml", "--set"], "the required argument for option '--set' is missing"),
                (["plan", "run.toml", "--ranks", "0"], "--ranks 0: a positive integer is expected"),
                (["plan", "run.toml", "--gpu-memory", "much"], "--gpu-memory: 'much' is no size: say 5GB, 500MB or 2GiB"),
                (["plan", "run.toml", "--ranks", "2x"], "--ranks 2x: a positive integer is expected"),
                (["sample", "x", "--top-p", "0"], "--top-p 0: a number above 0 and up to 1 is expected"),
                (["sample", "x", "--set", "a.b=c"], "unknown option '--set'"),
                (["train", "run.toml", "--tokenizer", "x"], "unknown option '--tokenizer'"),
                (["evaluate", "run.toml", "--batches", "few"], "--batches few: a positive integer is expected"),
                (["inspect", "nothing"], "nothing: neither the directory of a checkpoint or a run, nor token files (no nothing.idx)"),
                (["plan", "run.toml", "--log-level", "loud"], "unknown log level 'loud'"),
                (["--verison"], "unknown option '--verison'; did you mean '--version'?")):
            with self.subTest(arguments=arguments):
                self.refused(*arguments, says=[message])

    def test_help_has_an_example_for_each_command(self):
        for command in ("plan", "convert", "train", "export", "inspect", "verify", "sample", "evaluate"):
            result = self.run_program(command, "--help")
            self.assertEqual(result.returncode, 0)
            self.assertRegex(result.stdout, rf"Example\n  (mpirun -n \d+ )?upcycle {command} ")
        self.assertIn("Exit codes", self.run_program("--help").stdout)

    def test_version_names_all_libraries(self):
        result = self.run_program("--version")
        self.assertEqual(result.returncode, 0)
        for library in ("LibTorch", "HDF5", "toml\\+\\+", "spdlog", "Boost", "nlohmann-json", "xxHash"):
            self.assertRegex(result.stdout, rf"{library} +\d+\.\d+")
        self.assertRegex(result.stdout, r"MPI \(.*\d+\.\d+")


class Plans(Case):
    def plan(self, name, *arguments):
        result = subprocess.run([served(PROGRAM), "plan", f"configs/{name}", "--json", *arguments], cwd=SOURCE, capture_output=True, text=True)
        self.assertEqual(result.returncode, 0, result.stderr)
        return json.loads(result.stdout)

    def test_qwen3_14b_with_64_experts(self):
        result = subprocess.run([served(PROGRAM), "plan", "configs/qwen3-14b-64e.toml"], cwd=SOURCE, capture_output=True, text=True)
        self.assertEqual(result.returncode, 0, result.stderr)
        self.assertIn("89.65 B total, 14.78 B active", result.stdout)
        plan = self.plan("qwen3-14b-64e.toml")
        self.assertEqual(round(plan["parameters"]["total"] / 1e9, 2), 89.65)
        self.assertEqual(plan["exactness"], "exact")
        self.assertEqual(plan["ranks"], 32)
        self.assertEqual(len(plan["bytes_per_rank"]), 4)
        self.assertEqual([stage["micro_batches_in_flight"] for stage in plan["bytes_per_rank"]], [4, 3, 2, 1])
        fits = {mode: row["fits"] for mode, row in plan["by_recompute"].items()}
        self.assertEqual((fits["none"], fits["full"]), (False, True), "of 80 GB")
        self.assertAlmostEqual(plan["pipeline_bubble"], 3 / 16)
        self.assertEqual({row["axis"] for row in plan["bytes_sent_per_step"]}, {"pipeline", "expert", "replica"})
        self.refused("plan", SOURCE / "configs/qwen3-14b-64e.toml", "--gpu-memory", "80GB", "--set", "train.recompute=none",
                     f"source.architecture={MODELS / 'qwen3-14b.json'}",
                     says=["stage 0 needs ", " on each rank, and a GPU has 80.0 GB: train.recompute = \"full\" would need "])
        self.assertEqual(plan["origins"]["moe.pre_softmax"], "default")
        refused = subprocess.run([served(PROGRAM), "plan", "configs/qwen3-14b-64e.toml", "--set", "moe.granularity=1"], cwd=SOURCE,
                                 capture_output=True, text=True)
        self.assertEqual(refused.returncode, 2)
        self.assertIn("688.6e9 parameters, more than moe.max_parameters = 140e9", refused.stderr)

    def test_published_numbers(self):
        plan = self.plan("qwen3-1.7b-4e.toml")
        self.assertEqual(round(plan["parameters"]["total"] / 1e9, 3), 4.892)
        self.assertEqual(round(plan["flops_per_token"] / 1e9, 2), 18.07)
        plan = self.plan("qwen3-0.6b-8e.toml")
        self.assertEqual(round(plan["parameters"]["total"] / 1e9, 3), 2.446)
        self.assertEqual(round(plan["flops_per_token"] / 1e9, 2), 6.57)

    def test_dense_models_have_their_published_sizes(self):
        for size, parameters in (("0.6b", 596049920), ("1.7b", 1720574976), ("4b", 4022468096), ("8b", 8190735360), ("14b", 14768307200)):
            self.store("dense.toml", f'[source]\narchitecture = "{MODELS / f"qwen3-{size}.json"}"\n')
            plan = json.loads(self.run_program("plan", "dense.toml", "--json").stdout)
            self.assertEqual(plan["parameters"]["total"], parameters, size)
            self.assertEqual(plan["exactness"], "random")

    def test_a_checkpoint_is_a_source(self):
        self.store("run.toml", GOOD + "[moe]\nexperts = 4\n[train]\nsteps = 1\nsequence = 16\nglobal_batch = 1\nprecision = \"fp32\"\n")
        trained = self.run_program("train", "run.toml")
        self.assertEqual(trained.returncode, 0, trained.stderr)
        self.store("next.toml", '[source]\nmodel = "runs/good"\n')
        plan = json.loads(self.run_program("plan", "next.toml", "--json").stdout)
        self.assertEqual(plan["architecture"]["num_experts"], 4)
        self.assertEqual(plan["exactness"], "unchanged")
        self.refused("plan", "next.toml", "--set", "moe.experts=4", "moe.top_k=1", says=["a mixture of 4 experts, top-2, but [moe] asks for experts = 4"])
        self.refused("plan", "next.toml", "--set", "moe.experts=8", says=["needs moe.top_k = 4: the source takes 2 of its 4 experts"])
        larger = json.loads(self.run_program("plan", "next.toml", "--json", "--set", "moe.experts=8", "moe.top_k=4").stdout)
        self.assertEqual((larger["architecture"]["num_experts"], larger["exactness"]), (8, "exact"))

    def test_the_resolved_run_is_a_run_file(self):
        self.store("run.toml", GOOD + "[moe]\nexperts = 4\n")
        first = self.run_program("plan", "run.toml", "--set", "train.steps=7")
        self.assertEqual(first.returncode, 0, first.stderr)
        resolved = first.stdout.split("The resolved run\n", 1)[1]
        self.assertIn("# --set", resolved)
        self.store("again.toml", resolved)
        read = lambda *arguments: json.loads(self.run_program("plan", *arguments, "--json").stdout)["run"]
        self.assertEqual(read("again.toml"), read("run.toml", "--set", "train.steps=7"))


if __name__ == "__main__":
    unittest.main(argv=[sys.argv[0], *sys.argv[3:]])
