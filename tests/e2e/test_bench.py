#!/usr/bin/env python3
"""tools/bench: both sides of a comparison do the same work, what it reports is what it measured, and a measurement that is none is refused.
Usage: test_bench.py UPCYCLE SOURCE_DIR [unittest arguments]"""
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

UPCYCLE = SOURCE = None
sys.dont_write_bytecode = True


class Case(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.root = Path(scratch.name)

    def bench(self, *arguments, expect=0):
        result = subprocess.run([sys.executable, SOURCE / "tools/bench", *map(str, arguments)], capture_output=True, text=True, timeout=280)
        self.assertEqual(result.returncode, expect, result.stdout + result.stderr)
        return result.stdout + result.stderr


class Training(Case):
    def test_training(self):
        """Every step's loss is transformers', as AdamW and clipping are the same, too. In bf16 both round in other places; the losses of an untrained
        model say little to the 2e-2 that the tool allows there, and these are 1e-4 apart."""
        ways = {("dense", "fp32"): {"fp32"}, ("moe", "fp32"): {"fp32 grouped_mm", "fp32 eager"}, ("dense", "bf16"): {"bf16", "autocast"},
                ("moe", "bf16"): {f"{kind} {experts}" for kind in ("bf16", "autocast") for experts in ("grouped_mm", "eager")}}
        first_losses, tolerances = {}, {"fp32": 1e-4, "bf16": 1e-3}
        out = self.root / "out.json"
        said = self.bench("cpu", "--only", "training", "--size", "tiny", "--steps", 2, "--repeats", 1, "--threads", 2, "--upcycle", UPCYCLE,
                          "--scratch", self.root, "--json", out)
        self.assertEqual(sorted(self.root.iterdir()), [out], "scratch files are left")
        rows = json.loads(out.read_text())["training"]
        self.assertEqual([(row["model"], row["precision"]) for row in rows], list(itertools.product(("dense", "moe"), tolerances)))
        for row in rows:
            precision = row["precision"]
            self.assertEqual(set(row["losses"]), {"transformers", "ours, 1 rank", "ours, 2 ranks"})
            for losses in row["losses"].values():
                self.assertEqual(len(losses), 4)
                for mine, theirs in zip(losses, row["losses"]["transformers"]):
                    self.assertAlmostEqual(mine, theirs, delta=tolerances[precision] * theirs)
            first_losses.setdefault(row["model"], set()).add(row["losses"]["ours, 1 rank"][0])
            way, tries = row["transformers"], row["transformers_tries_seconds"]
            self.assertIn(way, ways[row["model"], precision])
            if len(ways[row["model"], precision]) > 1:   # where there is a choice, the fastest of those that run here
                self.assertTrue(tries)
                self.assertLessEqual(set(tries), ways[row["model"], precision])
                self.assertEqual(way, min(tries, key=tries.get))
                self.assertGreater(min(tries.values()), 0)
            rates = row["tokens_per_second"]
            for side, rate in rates.items():
                self.assertAlmostEqual(rate, row["tokens_per_step"] / statistics.median(row["run_medians_seconds"][side]))
            best = max(rate for side, rate in rates.items() if side != "transformers")
            self.assertRegex(said, rf'\n{row["model"]} +{precision} .* {rates["transformers"]:.0f} +{way} .* {best:.0f} .* {best / rates["transformers"]:.2f} ')
        self.assertEqual({model: len(losses) for model, losses in first_losses.items()}, {"dense": 2, "moe": 2}, "bf16 did what fp32 does")

    def test_other_work_is_refused(self):
        """A program that trains on other tokens stands for one that does other work."""
        program = self.root / "upcycle"
        program.write_text(f'#!/bin/sh\n[ "$1" = train ] && sed -i "s/^train = .*/train = \\"mock\\"/" "$2"\nexec "{UPCYCLE}" "$@"\n')
        program.chmod(0o755)
        said = self.bench("cpu", "--only", "training", "--size", "tiny", "--precision", "fp32", "--steps", 1, "--repeats", 1, "--threads", 1,
                          "--upcycle", program, expect=1)
        self.assertIn("they do not do the same work", said)


class Others(Case):
    STEP = ("step", "--device", "cpu", "--model", "tiny", "--micro-batch", 2, "--sequence", 32, "--warm-up", 2, "--steps", 3)

    def test_step(self):
        """Everyone trains the same model on the same tokens, and the table says what was measured."""
        out = self.root / "out.json"
        said = self.bench(*self.STEP, "--peers", "transformers,compiled,torchtitan", "--upcycle", UPCYCLE, "--scratch", self.root, "--json", out)
        self.assertEqual(sorted(self.root.iterdir()), [out], "scratch files are left")
        one, = json.loads(out.read_text())["models"]
        # 6 per weight that a token meets: 2 layers of q, k, v, out (64 x 192), 2 experts of 3 x 64 x 32, and the head; causal attention.
        self.assertEqual(one["flops_per_token"], 6 * (2 * (64 * (2 * 64 + 2 * 32) + 2 * 3 * 64 * 32) + 64 * 512) + 6 * 2 * 64 * 32)
        results = {result["who"]: result for result in one["results"]}
        self.assertEqual(set(results), {"ours", "transformers", "compiled", "torchtitan"})
        for who, result in results.items():
            if "failed" in result:
                self.assertEqual(who, "torchtitan")
                self.assertIn("not installed here", result["failed"])
                self.assertIn("torchtitan, 2x32: not installed here", said)
                continue
            self.assertEqual((len(result["seconds"]), len(result["losses"])), (3, 5))
            for loss in result["losses"]:   # ln 512 for labels that nobody can know, and matrices of 0.02
                self.assertAlmostEqual(loss, 6.24, delta=0.15)
            self.assertAlmostEqual(result["gradient_norm"], 2.0, delta=0.4)   # the same model for all: nothing vanishes
            self.assertEqual(result["step_seconds"], statistics.median(result["seconds"]))
            self.assertAlmostEqual(result["flops_per_second"], 2 * 32 / result["step_seconds"] * one["flops_per_token"])
            self.assertRegex(said, rf'\n{who} .* {1e3 * result["step_seconds"]:.1f} ')
        self.assertGreater(results["ours"]["start_seconds"], 0)
        self.assertEqual(results["ours"]["states"], "float32")
        self.assertEqual(results["compiled"]["parameters"], results["transformers"]["parameters"])

    def test_step_of_another_size_is_refused(self):
        """A program that trains shorter sequences stands for one that does less than is counted."""
        program = self.root / "upcycle"
        program.write_text(f'#!/bin/sh\ncase $1 in convert | train) exec "{UPCYCLE}" "$@" --set train.sequence=16 ;; esac\nexec "{UPCYCLE}" "$@"\n')
        program.chmod(0o755)
        said = self.bench(*self.STEP, "--peers", "none", "--upcycle", program, expect=1)
        self.assertIn("FLOPs a token, this script", said)

    def test_step_that_fails_is_told(self):
        said = self.bench(*self.STEP, "--peers", "none", "--upcycle", UPCYCLE, "--set", "optimizer.clip=-1", expect=1)
        self.assertIn("optimizer.clip", said)
        self.assertIn("--peers: no megatron", self.bench("step", "--peers", "megatron", expect=2))
        if not shutil.which("nvidia-smi"):
            self.assertIn("no GPU here", self.bench("step", "--upcycle", UPCYCLE, "--peers", "none", expect=1))

    def test_tables_of_operations(self):
        """What gpu_bench prints becomes shares of the nearer bound."""
        program = self.root / "gpu_bench"
        lines = [{"device": "a GPU", "copy_bytes_per_second": 4e12, "product_flops_per_second": 8e14, "side": 8192},
                 {"shape": "1.7B E4", "op": "swiglu, forward", "seconds": 2e-4, "spread": 0.01, "bytes": 6e8, "flops": 0, "bound_seconds": 1.5e-4,
                  "share_of_bound": 0.75, "plain_seconds": 8e-4},
                 {"shape": "1.7B E4", "op": "attention, forward", "seconds": 1e-3, "spread": 0.02, "bytes": 1e8, "flops": 4e11, "bound_seconds": 5e-4,
                  "share_of_bound": 0.5}]
        program.write_text("#!/bin/sh\n" + "".join(f"echo '{json.dumps(line)}'\n" for line in lines))
        program.chmod(0o755)
        said = self.bench("ops", "--program", program, "--json", self.root / "ops.json")
        self.assertRegex(said, r"swiglu, forward +0\.200 +1 % +0\.150 +75 % +3\.00 TB/s +0\.800 +4\.00")
        self.assertRegex(said, r"attention, forward +1\.000 +2 % +0\.500 +50 % +400 TFLOP/s +- +-")
        self.assertEqual([line["op"] for line in json.loads((self.root / "ops.json").read_text())["operations"]], ["swiglu, forward", "attention, forward"])
        self.assertIn("no program /nowhere", self.bench("moe-layer", "--program", "/nowhere", expect=1))

    def test_checkpoints(self):
        """What checkpoint_io prints, of which one line stands for each repeat, becomes rates and shares of plain files. From a bundle."""
        bundle, words = self.root / "bundle", self.root / "words"
        shutil.copytree(SOURCE / "tools", bundle / "tools", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(SOURCE / "configs", bundle / "configs")
        line = {"bytes": 4_000_000_000, "save_seconds": 4.0, "plain_write_seconds": 3.0, "plain_direct_write_seconds": 2.0, "load_seconds": 2.5,
                "plain_read_seconds": 2.0, "verify_seconds": 1.6, "save_extra_bytes": 48 << 20, "load_extra_bytes": 24 << 20, "stall_seconds": 0.5,
                "update_waits_seconds": 3.25}
        for name, script in (("upcycle", "echo upcycle 0"), ("checkpoint_io", f"echo $4 >> {words}; grep asynchronous $1 >> {words}; echo '{json.dumps(line)}'")):
            (bundle / name).write_text(f"#!/bin/sh\n{script}\n")
            (bundle / name).chmod(0o755)

        def bench(*arguments):
            words.unlink(missing_ok=True)
            result = subprocess.run([sys.executable, bundle / "tools/bench", "checkpoint", "--ranks", "1", "--scratch", self.root, *arguments], capture_output=True,
                                    text=True, timeout=60)
            self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
            return result.stdout, words.read_text().split()
        cells = r"\nwhole rows +1 +4\.00 +1\.00 +0\.50 +0 % +1\.60 +0\.80 +2\.50 +1\.25 +3815 +48 +24"
        table, told = bench()
        self.assertRegex(table, cells + r"\n")
        self.assertEqual(told, ["asynchronous", "=", "false"])
        table, told = bench("--asynchronous")
        self.assertRegex(table, cells + r" +0\.50 +8\.0 +3\.25\n")
        self.assertEqual(told, ["asynchronous", "=", "true"])
        table, told = bench("--streamed")
        self.assertRegex(table, cells + r" +0\.50 +8\.0 +3\.25\n")
        self.assertEqual(told, ["streamed", "asynchronous", "=", "true"])

    def test_gpu_stops_at_a_test_that_fails(self):
        """From a bundle: tools/ beside the programs."""
        bundle = self.root / "bundle"
        shutil.copytree(SOURCE / "tools", bundle / "tools", ignore=shutil.ignore_patterns("__pycache__"))
        for name, code in (("gpu_ops", 0), ("gpu_step", 3)):
            (bundle / name).write_text(f"#!/bin/sh\necho {name} was here\nexit {code}\n")
            (bundle / name).chmod(0o755)
        result = subprocess.run([sys.executable, bundle / "tools/bench", "gpu", "--tests", "gpu_ops", "gpu_step", "--out", self.root / "out"], capture_output=True,
                                text=True, timeout=60)
        self.assertEqual(result.returncode, 1, result.stdout + result.stderr)
        self.assertIn("failed: gpu_step", result.stdout)
        self.assertNotIn("tools/bench step", result.stdout)
        self.assertIn("gpu_ops was here", (self.root / "out/log.txt").read_text())

    def test_conversion(self):
        """All of the source is read, all of the mixture is written, and the bound is the disk's own time for both."""
        out = self.root / "out.json"
        said = self.bench("cpu", "--only", "conversion", "--model", "0.6b", "--layers", 1, "--jobs", "experts", "--repeats", 1, "--threads", 2,
                          "--upcycle", UPCYCLE, "--scratch", self.root, "--json", out)
        self.assertEqual(sorted(self.root.iterdir()), [out], "scratch files are left")
        row, = json.loads(out.read_text())["conversion"]
        experts, rest = 3 * 1024 * 3072, 151936 * 1024 + 1024 * 128 * (2 * 16 + 2 * 8)
        self.assertAlmostEqual(row["source_bytes"], 2 * (rest + experts), delta=1e5)
        self.assertAlmostEqual(row["written_bytes"], 2 * (rest + 8 * experts), delta=3e6)   # HDF5's own, and the router
        self.assertEqual(set(row["ranks"]), {"1", "2"})
        for ranks, result in row["ranks"].items():
            plain, = result["plain"]
            disk = plain["read"] + min(plain["write"], plain["direct write"])
            self.assertRegex(said, rf'\nconvert to 8 experts +{ranks} .* {disk:.1f} +{disk / result["seconds"][0]:.2f} +{result["memory_bytes"][0] / 1e9:.2f} ')
            self.assertGreater(result["memory_bytes"][0], int(ranks) * 50e6)

    def test_plain_files(self):
        """The processes read and write each byte once, to the last."""
        sys.path.insert(0, str(SOURCE / "tools"))
        from benchmarks import plain_files
        size = 2 * plain_files.PIECE + 4097
        for processes in (1, 2, 3, 5):
            shares = [share for number in range(processes) for share in plain_files.pieces(size, number, processes)]
            self.assertEqual([offset for offset, _ in shares], [0, plain_files.PIECE, 2 * plain_files.PIECE])
            self.assertEqual(sum(count for _, count in shares), size)
        file = self.root / "file"
        file.write_bytes(bytes(size))
        self.assertGreater(plain_files.read([file], 2), 0)
        self.assertGreater(plain_files.write(self.root / "new", size, 2, direct=False), 0)
        with self.assertRaises(OSError):
            plain_files.write(self.root / "nowhere/new", size, 2, direct=False)
        self.assertEqual(list(self.root.iterdir()), [file])

    def test_memory(self):
        sys.path.insert(0, str(SOURCE / "tools"))
        from benchmarks import common
        allocate = "import sys, time; x = bytearray(200_000_000); time.sleep(0.3); sys.stdout.write('done')"
        done = common.run(["bash", "-c", f'"{sys.executable}" -c "{allocate}" & "{sys.executable}" -c "{allocate}"; wait'], common.environment(1),
                          watch="python")
        self.assertEqual(done.output, "donedone")
        self.assertGreater(done.memory_bytes, 400_000_000)
        self.assertLess(done.memory_bytes, 460_000_000)
        with self.assertRaisesRegex(common.Failed, "ended with code 3"):
            common.run(["bash", "-c", "exit 3"], common.environment(1))

    def test_usage(self):
        self.assertIn("cpu ", self.bench("--help"))
        self.assertIn("--json", self.bench("cpu", "--help"))
        self.assertIn("no part gpus", self.bench("gpus", expect=2))
        self.assertIn("which part?", self.bench(expect=2))
        self.assertIn("--repeats must be 1 or more", self.bench("cpu", "--repeats", 0, expect=2))
        self.assertIn("no program /nowhere", self.bench("cpu", "--upcycle", "/nowhere", expect=1))

    def test_help_of_every_tool(self):
        for tool in ("setup", "test", "quickstart", "bundle", "bench"):
            for directory, program in ((SOURCE / "tools", f"./{tool}"), ("/", SOURCE / "tools" / tool)):
                result = subprocess.run([program, "--help"], cwd=directory, capture_output=True, text=True, timeout=60)
                self.assertEqual((result.returncode, result.stderr), (0, ""), tool)
                self.assertIn(f"tools/{tool}", result.stdout.splitlines()[0])
            if tool != "test":   # whose further words are CTest's
                result = subprocess.run([SOURCE / "tools" / tool, "--nonsense"], capture_output=True, text=True, timeout=60)
                self.assertEqual((result.returncode, result.stdout), (2, ""), tool)
                self.assertIn(f"tools/{tool}", result.stderr)


if __name__ == "__main__":
    UPCYCLE, SOURCE = Path(sys.argv.pop(1)).resolve(), Path(sys.argv.pop(1)).resolve()
    unittest.main()
