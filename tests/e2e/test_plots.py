#!/usr/bin/env python3
"""tools/plots: what it reads out of metrics.jsonl, and that pictures come of it."""
import importlib.machinery
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import numpy

sys.dont_write_bytecode = True  # the tool lies in the source tree
TOOL = Path(__file__).resolve().parents[2] / "tools/plots"
loader = importlib.machinery.SourceFileLoader("plots", str(TOOL))
plots = importlib.util.module_from_spec(importlib.util.spec_from_loader("plots", loader))
sys.modules["plots"] = plots
loader.exec_module(plots)


def step(number, loss=5.0, counts=None, **more):
    line = {"kind": "step", "step": number, "tokens": 100 * number, "loss": loss, "lr": 1e-3, "grad_norm": 1.0,
            "skipped": False, **more}
    if counts is not None:
        load = sum(max(layer) * len(layer) / sum(layer) for layer in counts) / len(counts)
        line |= {"aux_loss": 1.0, "z_loss": 0.0, "load_max_over_mean": load, "tokens_per_expert": counts}
    return line


def start(number, name="run"):
    return {"kind": "start", "step": number, "tokens": 100 * number, "time": "2026-01-01T00:00:00Z", "ranks": 4, "name": name}


def validation(number, loss):
    return {"kind": "validation", "step": number, "tokens": 100 * number, "loss": loss}


class Plots(unittest.TestCase):
    def setUp(self):
        self.temporary = tempfile.TemporaryDirectory(prefix="upcycle-plots-")
        self.addCleanup(self.temporary.cleanup)
        self.folder = Path(self.temporary.name)

    def write(self, name, lines, end="\n"):
        (self.folder / name).mkdir(exist_ok=True)
        text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
        (self.folder / name / "metrics.jsonl").write_text(text + end)
        return str(self.folder / name)

    def draw(self, *arguments):
        environment = dict(os.environ, MPLCONFIGDIR=str(self.folder / "matplotlib"))
        return subprocess.run([sys.executable, str(TOOL), *arguments, "--out", str(self.folder / "out")], capture_output=True,
                              text=True, timeout=200, env=environment)

    def pixels(self, name):
        from matplotlib import image
        return image.imread(self.folder / "out" / name)

    def test_a_step_computed_twice_counts_once(self):
        run = plots.read(self.write("a", [start(0), step(1, 5.0), step(2, 4.0), step(3, 3.0), validation(3, 9.0), start(1),
                                          step(2, 4.5), step(3, 3.5), validation(3, 3.6), step(4, 3.0)]))
        tokens, loss = run.column("loss")
        self.assertEqual(tokens.tolist(), [100, 200, 300, 400])
        self.assertEqual(loss.tolist(), [5.0, 4.5, 3.5, 3.0])
        self.assertEqual(run.validation, {3: (300, 3.6)})
        self.assertEqual(run.resumes, [100])

    def test_skipped_and_infinite_steps_are_left_out(self):
        run = plots.read(self.write("a", [step(1), step(2, None), step(3, math.nan), step(4, 4.0, skipped=True), step(5, 3.0)]))
        self.assertEqual(run.column("loss")[1].tolist(), [5.0, 3.0])
        self.assertEqual(run.column("load_max_over_mean").shape, (2, 0))

    def test_labels(self):
        folder = self.write("folder", [start(0, "from the run file"), step(1)])
        self.assertEqual(plots.read(folder).label, "from the run file")
        self.assertEqual(plots.read("a = b=" + folder).label, "a = b")
        self.assertEqual(plots.read(self.write("plain", [step(1)])).label, "plain")

    def test_shares_are_per_layer_then_averaged(self):
        run = plots.read(self.write("a", [step(1, counts=[[30, 10], [100, 300]]), step(2, counts=[[20, 20], [1, 3]])]))
        tokens, share = run.shares()
        self.assertEqual(tokens.tolist(), [100, 200])
        numpy.testing.assert_allclose(share, [[50, 50], [37.5, 62.5]])
        self.assertIsNone(plots.read(self.write("dense", [step(1)])).shares())

    def test_smoothing_keeps_constants_lines_and_the_first_value(self):
        numpy.testing.assert_allclose(plots.smooth(numpy.full(333, 7.0)), 7.0)
        ramp = numpy.arange(600.0)
        numpy.testing.assert_allclose(plots.smooth(ramp)[:580], ramp[:580])
        noise = numpy.random.default_rng(1).normal(size=600)
        self.assertEqual(plots.smooth(noise)[0], noise[0])
        self.assertLess(plots.smooth(noise)[20:].std(), 0.4)
        self.assertAlmostEqual(plots.smooth(noise)[-1], noise[-11:].mean())
        self.assertEqual(plots.smooth(numpy.array([3.0])).tolist(), [3.0])

    def test_half_a_last_line_is_a_run_in_progress(self):
        path = self.write("a", [step(1), json.dumps(step(2))[:40]], end="")
        self.assertEqual(list(plots.read(path).steps), [1])

    def test_pictures(self):
        few = [step(s, 5 - s / 50, [[10 + s, 10, 10, 90 - s]] * 2) for s in range(1, 81)]
        many = [step(s, 5 - s / 40, [[100 + (e * s) % 37 for e in range(32)]] * 3) for s in range(1, 81)]
        dense = [step(s, 5 - s / 60) for s in range(1, 81)]
        for name, lines in (("few", few), ("many", many), ("dense", dense)):
            lines.insert(40, validation(40, 4.4))
            lines.insert(41, start(40))
            self.write(name, [start(0, name)] + lines)
        result = self.draw(*(str(self.folder / name) for name in ("dense", "few", "many")))
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertEqual(result.stdout.split(), [str(self.folder / "out/loss.png"), str(self.folder / "out/experts.png")])
        loss, experts = self.pixels("loss.png"), self.pixels("experts.png")
        self.assertEqual(loss.shape[:2], (645, 1050))    # 7.0 x 4.3 inches at 150 dpi
        self.assertEqual(experts.shape[:2], (960, 1440))  # two runs with experts
        for colour in ("#0072B2", "#D55E00", "#009E73"):  # a line of each run
            rgb = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
            self.assertGreater((abs(loss[..., :3] - rgb).max(axis=-1) < 0.01).sum(), 500, colour)

    def test_dense_runs_and_a_single_step(self):
        result = self.draw(self.write("dense", [step(1)]))
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertIn("no run has experts", result.stdout)
        self.assertFalse((self.folder / "out/experts.png").exists())
        result = self.draw(self.write("moe", [step(1, 5.0, [[5, 6]])]), self.write("fine", [step(1, 5.0, [[7] * 32])]),
                           self.write("only-validation", [validation(5, 3.0)]))
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertTrue((self.folder / "out/experts.png").exists())

    def test_mistakes_are_named(self):
        for lines, message in (
            (None, "metrics.jsonl: no such file"),
            ([start(0)], "no step was logged yet"),
            ([step(1), "{nonsense", step(2)], "line 2: not a line of metrics"),
            ([step(1), {"kind": "step", "step": 2}], "line 2: not a line of metrics (KeyError"),
            (["[1, 2]", step(1)], "line 1: not a line of metrics (TypeError"),
            ([step(1, None)], "no finite loss"),
        ):
            path = str(self.folder / "none") if lines is None else self.write("bad", lines)
            result = self.draw(path)
            self.assertEqual(result.returncode, 2, result)
            self.assertIn(message, result.stderr)
            self.assertNotIn("Traceback", result.stderr)
            self.assertFalse((self.folder / "out/loss.png").exists())


if __name__ == "__main__":
    unittest.main()
