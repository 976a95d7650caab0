#!/usr/bin/env python3
"""tools/bench scaling: every layout does the work that its row says, is held against one rank's losses, and a row that is none is told.
Usage: test_bench_scaling.py UPCYCLE COLLECTIVES SOURCE_DIR [unittest arguments]"""
import argparse
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

UPCYCLE = COLLECTIVES = SOURCE = None
sys.dont_write_bytecode = True
TINY = ("--device", "cpu", "--model", "tiny", "--sequence", 32, "--long-sequence", 64, "--micro-batch", 2, "--micro-batches", 4, "--steps", 2, "--warm-up", 1)


class Scaling(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.root = Path(scratch.name)

    def bench(self, *arguments, expect=0, upcycle=None, python=sys.executable):
        result = subprocess.run([sys.executable, SOURCE / "tools/bench", "scaling", *map(str, arguments), "--upcycle", upcycle or UPCYCLE, "--collectives", COLLECTIVES,
                                 "--scratch", self.root], capture_output=True, text=True, timeout=280,
                                env=os.environ | {"UPCYCLE_PYTHON": str(python)})
        self.assertEqual(result.returncode, expect, result.stdout + result.stderr)
        return result.stdout + result.stderr

    def test_every_axis(self):
        out = self.root / "out.json"
        said = self.bench(*TINY, "--no-traces", "--json", out, "--only", "dp,zero1,ep,tp,pp,pp-interleaved,cp")
        self.assertEqual(sorted(self.root.iterdir()), [out], "scratch files are left")
        told = json.loads(out.read_text())
        rows = {row["key"]: row for row in told["layouts"]}
        self.assertEqual(list(rows), ["dp", "zero1", "ep", "tp", "pp", "pp-interleaved", "cp"])
        self.assertIn("every chunk needs at least one layer", rows.pop("pp-interleaved")["failed"])   # two layers are no four chunks
        self.assertIn("PP2, interleaved, 4 x 32, 1 at a time: the run does not divide", said)
        alone = {one["step"]: one for one in told["one_gpu"]}
        tokens = {"4 x 32, 2 at a time": 128, "2 x 32": 64, "4 x 32, 1 at a time": 128, "1 x 64": 64}
        for key, row in rows.items():
            self.assertEqual((len(row["losses"]), len(row["seconds"])), (3, 1 if key == "pp" else 2), key)
            for name in ("losses", "gradient_norms"):   # of one rank's run with the same sequences, itself in the file
                for mine, theirs in zip(row[name], alone[row["step"]][name]):
                    self.assertAlmostEqual(mine / theirs, 1, delta=5e-3 if name == "gradient_norms" else 2e-4)
            self.assertLess(row["loss_difference"], 2e-4)
            self.assertTrue(row["same"])
            self.assertEqual(row["scaling"], "weak" if key in ("dp", "zero1", "ep") else "strong")
            self.assertAlmostEqual(row["tokens_per_second"], tokens[row["step"]] / statistics.median(row["seconds"]))
            reference = alone["2 x 32" if row["scaling"] == "weak" else row["step"]]
            self.assertAlmostEqual(row["of_perfect"], row["tokens_per_second"] / reference["tokens_per_second"] / 2)
            self.assertIn(f"{100 * row['of_perfect']:.1f} %", said)
        self.assertEqual(rows["dp"]["parallel"], {"zero": 0})
        self.assertEqual([len(rows["zero1"]["seconds"]), rows["tp"]["parallel"], rows["cp"]["parallel"]], [2, {"tensor": 2}, {"context": 2}])
        self.assertGreaterEqual(rows["ep"]["fullest_rank"], 1)
        self.assertIn("NOT FOR QUOTING", said)

    def test_what_moves(self):
        out = self.root / "out.json"
        said = self.bench("--device", "cpu", "--only", "start-up,collectives", "--sizes", "0.0625,0.25", "--json", out)
        told = json.loads(out.read_text())
        lines = told["collectives"]["lines"]
        counted = {"all-reduce": 2 * 1 / 2, "reduce-scatter": 1 / 2, "all-gather": 1 / 2, "all-to-all": 1 / 2, "send + receive": 1}
        self.assertEqual([(line["operation"], line["dtype"], line["bytes"]) for line in lines],
                         [(*of, size) for of in (("all-reduce", "fp32"), ("all-reduce", "bf16"), ("reduce-scatter", "fp32"), ("reduce-scatter", "bf16"), ("all-gather", "bf16"),
                                                 ("all-to-all", "bf16"), ("send + receive", "bf16")) for size in (65536, 262144)])
        for line in lines:
            for one in (line, line["peer"]):
                self.assertAlmostEqual(one["bus_bytes_per_second"] * one["seconds"] / line["bytes"], counted[line["operation"]])
            self.assertEqual((line["by"], line["peer"]["by"]), ("MPI", "Gloo"))
        start = told["start_up"]
        self.assertEqual(len(start["tries"]), 3)
        parts = start["start_up"]
        self.assertAlmostEqual(start["mpi_and_nccl"], parts["mpi"] + parts["communicators"] + parts["first_use"])
        # Each part is the slowest rank's, so that together they are no less than the whole, and the whole is no less than any.
        self.assertGreaterEqual(sum(parts.values()) - parts["all"], parts["all"] - 0.01)
        self.assertGreater(parts["all"], max(value for key, value in parts.items() if key != "all"))
        self.assertIn(f"{start['mpi_and_nccl']:.2f} s", said)
        self.assertEqual(told["layouts"], [])

    def test_a_peer_that_fails_is_told(self):
        python = self.root / "python"
        python.write_text("#!/bin/sh\necho no torch here\nexit 3\n")
        python.chmod(0o755)
        said = self.bench("--device", "cpu", "--only", "collectives", "--sizes", "0.0625", "--json", self.root / "out.json", python=python)
        self.assertRegex(said, r"all-reduce +bf16 +[0-9.]+ +- +-\n")
        self.assertIn("no torch here", said)
        self.assertEqual(json.loads((self.root / "out.json").read_text())["collectives"]["peer_failed"], "no torch here")

    def test_traces_and_a_loss_that_differs(self):
        """A program that on two ranks trains at another rate of learning stands for one with a wrong gradient. Its trace has no kernels on a CPU."""
        program = self.root / "upcycle"
        program.write_text(f'#!/bin/sh\n[ "$1" = train ] && [ -n "$OMPI_COMM_WORLD_SIZE" ] && exec "{UPCYCLE}" "$@" optimizer.lr=0.01\nexec "{UPCYCLE}" "$@"\n')
        program.chmod(0o755)
        said = self.bench(*TINY, "--only", "tp", "--json", self.root / "out.json", "--keep-traces", self.root / "kept", upcycle=program, expect=1)
        row, = json.loads((self.root / "out.json").read_text())["layouts"]
        self.assertFalse(row["same"])
        self.assertIn("a layout's losses are not one GPU's", said)
        self.assertIsNone(row["trace"])
        for rank in (0, 1):
            trace = self.root / f"kept/tp-rank{rank}.json"
            sys.path.insert(0, str(SOURCE / "tools"))
            from benchmarks import overlap
            wanted = [(event["cat"], event["name"], event["ts"], event["ts"] + event["dur"]) for event in json.loads(trace.read_text())["traceEvents"]
                      if event.get("ph") == "X" and event.get("cat") in ("cpu_op", "user_annotation")]
            self.assertEqual([name for category, name, *_ in wanted if name.startswith("step ")], ["step 6", "step 7", "step 8"])
            self.assertEqual([*overlap.events(trace, ("cpu_op", "user_annotation"))], wanted, "what is searched is not what is parsed")

    def test_one_rank(self):
        out = self.root / "out.json"
        said = self.bench(*TINY, "--gpus", 1, "--json", out)
        self.assertEqual([one["step"] for one in json.loads(out.read_text())["one_gpu"]], ["2 x 32", "4 x 32, 1 at a time", "1 x 64"])
        self.assertNotIn("Bus bandwidth", said)

    def test_usage(self):
        self.assertIn("--only: no tensor", self.bench("--only", "tensor", expect=2))
        self.assertIn("--sizes: no list of MiB", self.bench("--sizes", "much", expect=2))
        self.assertIn("--gpus must be 1 or more", self.bench("--gpus", 0, expect=2))
        self.assertIn("no program /nowhere", self.bench(upcycle="/nowhere", expect=1))


class Parts(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        sys.path.insert(0, str(SOURCE / "tools"))

    def trace(self, *events):
        """As Kineto writes it: (category, name, begin, microseconds)."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        file = Path(folder.name) / "trace.json"
        file.write_text('{\n  "traceEvents": [\n' + ",\n".join(
            f'  {{\n    "ph": "X", "cat": "{category}", "name": "{name}", "pid": 0, "tid": 7,\n    "ts": {1e12 + begin:.3f}, "dur": {duration:.3f},\n'
            f'    "args": {{\n      "External id": 3, "stream": 7\n    }}\n  }}' for category, name, begin, duration in events) + "\n]}\n")
        json.loads(file.read_text())
        return file

    def test_exposed(self):
        from benchmarks import overlap
        file = self.trace(("kernel", "gemm<a, 'b'>", 0, 300), ("kernel", "ncclDevKernel_AllReduce_Sum_f32_RING_LL(ncclDevKernelArgsStorage<4096ul>)", 200, 300),
                          ("kernel", "ncclDevKernel_SendRecv", 450, 150), ("gpu_memcpy", "Memcpy HtoD", 550, 150), ("kernel", "norm", 590, 20),
                          ("kernel", "say \\\"this\\\"", 900, 90), ("cpu_op", "aten::mm", 0, 5000), ("gpu_user_annotation", "step 6", 0, 5000))
        # NCCL 200-600; others 0-300, 590-610, 900-990; copies until 700; nothing 700-900.
        self.assertEqual({key: round(1e6 * 3 * value, 3) for key, value in overlap.of_trace(file).items()}, {"exposed": 290, "hidden": 110, "idle": 200, "window": 990})
        other = self.trace(("kernel", "ncclDevKernel", 0, 300))
        both = overlap.of_ranks([file, other])
        self.assertAlmostEqual(3e6 * both["exposed"], 295)
        self.assertAlmostEqual(3e6 * both["exposed_most"], 300)
        self.assertIsNone(overlap.of_ranks([self.trace(("cpu_op", "aten::mm", 0, 10))]))

    def test_lengths_by_counting(self):
        from benchmarks import overlap
        numbers = random.Random(1)
        for _ in range(200):
            one, other = ([(begin, begin + numbers.randrange(6)) for begin in numbers.choices(range(40), k=numbers.randrange(9))] for _ in range(2))
            marks = [{moment for begin, end in spans for moment in range(begin, end)} for spans in (one, other)]
            self.assertEqual(overlap.length(overlap.union(one)), len(marks[0]))
            self.assertEqual(overlap.shared(overlap.union(one), overlap.union(other)), len(marks[0] & marks[1]))

    def test_pipeline_is_cut_evenly(self):
        """No cut is better, by trying all of them."""
        from benchmarks import accelerator, layouts
        for count, (stages, virtual) in itertools.product((4, 7, 13, 14), ((2, 1), (2, 2), (4, 1))):
            of = accelerator.shape("1.7b-e4") | {"layers": count}
            head = 6 * 2048 * 151936 / ((accelerator.flops_per_token(of, 4096) - 6 * 2048 * 151936) / count)
            keys, at_best = layouts.pipeline(of, 4096, stages, virtual, 32)
            counts = [*map(int, keys["layout"].split("|"))]
            self.assertEqual((sum(counts), len(counts), min(counts) >= 1), (count, stages * virtual, True))
            every = (cut for cut in itertools.product(range(1, count + 1), repeat=stages * virtual) if sum(cut) == count)
            least = min(32 * max(sum(cut[stage::stages]) + (stage == stages - 1) * head for stage in range(stages)) + (stages - 1) * max([*cut[:-1], cut[-1] + head])
                        for cut in every)
            self.assertAlmostEqual(at_best, 32 * (count + head) / stages / least)
        keys, at_best = layouts.pipeline(of | {"vocab": 0}, 4096, 2, 1, 32)   # no head: the bubble alone
        self.assertEqual(keys, {"pipeline": 2, "virtual_stages": 1, "layout": "7|7"})
        self.assertAlmostEqual(at_best, 32 / 33)
        self.assertAlmostEqual(layouts.pipeline(of | {"vocab": 0, "layers": 16}, 4096, 2, 2, 32)[1], 32 / 32.5)

    def test_layouts_of_more_ranks(self):
        from benchmarks import accelerator, layouts
        of = accelerator.shape("1.7b-e4")
        for ranks, expected in ((1, []), (2, ["dp", "zero1", "ep", "tp", "pp", "pp-interleaved", "cp"]),
                                (4, [*layouts.GOALS]), (8, [key for key in layouts.GOALS if key != "ep"])):
            chosen = argparse.Namespace(ranks=ranks, only=[*layouts.GOALS], sequence=4096, long_sequence=32768, micro_batch=4, micro_batches=32)
            found = {layout.key: layout for layout in layouts.layouts(chosen, of, "full")}
            self.assertEqual(list(found), expected)
            for layout in found.values():
                self.assertEqual(ranks % (layout.parallel.get("tensor", 1) * layout.parallel.get("pipeline", 1) * layout.parallel.get("context", 1)), 0)
                self.assertEqual(layout.work.sequences, layout.alone.sequences * (ranks if layout.kind == "weak" else 1))
                self.assertEqual(layout.work.micro_batch, layout.alone.micro_batch)
        self.assertEqual((found["dp-ep"].name, found["tp-pp"].name), ("DP2 x EP4", "TP2 x PP4, 1F1B"))

    def test_layers_that_fit(self):
        from benchmarks import accelerator, layouts
        of, work = accelerator.shape("1.7b-e4"), layouts.Work(4096, 4, 4)
        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            self.assertEqual(layouts.layers_that_fit(UPCYCLE, folder, of, work, 1e12), 28)
            memory = 80 * 2**30
            layers = layouts.layers_that_fit(UPCYCLE, folder, of, work, memory)
            self.assertLess(layers, 28)
            needed = [layouts.planned(UPCYCLE, folder, of | {"layers": number}, work)["none"] for number in (layers, layers + 1)]
            self.assertLessEqual(needed[0], layouts.MARGIN * memory)
            self.assertGreater(needed[1], layouts.MARGIN * memory)
            self.assertEqual(layouts.recompute_that_fits(UPCYCLE, folder, of | {"layers": layers}, layouts.Work(32768, 1, 1), memory), "full")


if __name__ == "__main__":
    UPCYCLE, COLLECTIVES, SOURCE = (Path(sys.argv.pop(1)).resolve() for _ in range(3))
    unittest.main()
