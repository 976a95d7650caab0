#!/usr/bin/env python3
"""tools/plots: what it reads out of metrics.jsonl, and that pictures come of it."""
import contextlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import unittest
import unittest.mock
import xml.etree.ElementTree
from pathlib import Path

import numpy

import tool_module

plots = tool_module.load("plots")
import plots_experts
import user_error
from plots_runs import read
from plots_style import smooth

TOOL = tool_module.TOOLS / "plots"


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


def look(number, layers, **columns):
    return {"kind": "experts", "step": number, "tokens": 100 * number, "steps": 10, "layers": layers, **columns}


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
        """In this process, as the tool's last line does it: exit code and what it said."""
        said, complained = io.StringIO(), io.StringIO()
        code = 0
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained), unittest.mock.patch("sys.argv", self.command(*arguments)[1:]):
            try:
                user_error.run("tools/plots", plots.main)
            except SystemExit as end:
                code = end.code
        plots.plt.close("all")
        return subprocess.CompletedProcess(arguments, code, said.getvalue(), complained.getvalue())

    def command(self, *arguments):
        return [sys.executable, str(TOOL), "--out", str(self.folder / "out"), *arguments]

    def pixels(self, name):
        from matplotlib import image
        return image.imread(self.folder / "out" / name)

    def test_a_step_computed_twice_counts_once(self):
        run = read(self.write("a", [start(0), step(1, 5.0), step(2, 4.0), step(3, 3.0), validation(3, 9.0), start(1),
                                          step(2, 4.5), step(3, 3.5), validation(3, 3.6), step(4, 3.0)]))
        tokens, loss = run.column("loss")
        self.assertEqual(tokens.tolist(), [100, 200, 300, 400])
        self.assertEqual(loss.tolist(), [5.0, 4.5, 3.5, 3.0])
        self.assertEqual(run.validation, {3: (300, 3.6)})
        self.assertEqual(run.resumes, [100])

    def test_a_start_takes_back_what_was_not_computed_again(self):
        run = read(self.write("a", [start(0), step(1, 5.0), step(2, 4.0), step(3, 3.0), look(3, [0]), validation(3, 9.0), start(1), step(2, 4.5)]))
        self.assertEqual(run.column("loss")[1].tolist(), [5.0, 4.5])
        self.assertEqual((run.validation, run.looks), ({}, {}))

    def test_a_roll_back_takes_back_what_went_wrong(self):
        back = {"kind": "rollback", "step": 1, "tokens": 300, "time": "2026-01-01T00:00:00Z", "from": 3, "bad_steps": 2, "why": "a loss spike"}
        run = read(self.write("a", [start(0), step(1, 5.0), step(2, 40.0), validation(2, 9.0), step(3, 30.0), back, step(2, 4.5) | {"tokens": 400}]))
        tokens, loss = run.column("loss")
        self.assertEqual((tokens.tolist(), loss.tolist()), ([100, 400], [5.0, 4.5]))
        self.assertEqual((run.validation, run.resumes), ({}, []))

    def test_skipped_and_infinite_steps_are_left_out(self):
        run = read(self.write("a", [step(1), step(2, None), step(3, math.nan), step(4, 4.0, skipped=True), step(5, 3.0)]))
        self.assertEqual(run.column("loss")[1].tolist(), [5.0, 3.0])
        self.assertEqual(run.column("load_max_over_mean").shape, (2, 0))

    def test_labels(self):
        folder = self.write("folder", [start(0, "from the run file"), step(1)])
        self.assertEqual(read(folder).label, "from the run file")
        self.assertEqual(read("a = b=" + folder).label, "a = b")
        self.assertEqual(read(self.write("plain", [step(1)])).label, "plain")

    def test_loads_are_per_layer(self):
        run = read(self.write("a", [step(1, counts=[[30, 10], [100, 300]]), step(2, counts=[[20, 20], [1, 3]])]))
        tokens, load = run.loads()
        self.assertEqual(tokens.tolist(), [100, 200])
        numpy.testing.assert_allclose(load, [[[1.5, 0.5], [0.5, 1.5]], [[1, 1], [0.5, 1.5]]])
        self.assertIsNone(read(self.write("dense", [step(1)])).loads())

    def test_looks_at_the_experts(self):
        run = read(self.write("a", [step(1), look(0, [1, 3], cosine=[0.5, 0.7]), look(10, [1, 3], cosine=[0.4, None]),
                                          look(20, [1, 3], cosine=[0.2, 0.3], distance=[[0.1, 0.3], [0.2, None]], dead=[0, 1])]))
        tokens, cosine = run.look_at("cosine")
        self.assertEqual((tokens.tolist(), cosine.tolist()), ([0, 2000], [[0.5, 0.7], [0.2, 0.3]]))
        numpy.testing.assert_allclose(run.look_at("distance")[1], [[0.2, 0.2]])
        self.assertEqual(run.look_at("dead")[1].tolist(), [[0, 1]])
        self.assertIsNone(run.look_at("cosine_inside"))
        self.assertEqual((run.layer_numbers(2), run.layer_numbers(3)), ([1, 3], None))

    def test_a_map_over_time_has_a_bounded_width(self):
        cells = plots_experts.in_columns(numpy.arange(3000.0).reshape(1000, 3))
        self.assertEqual(cells.shape, (3, plots_experts.MOST_COLUMNS))
        numpy.testing.assert_allclose(cells[0], numpy.linspace(2, 2996, plots_experts.MOST_COLUMNS), atol=3, err_msg="time runs evenly")
        self.assertEqual(plots_experts.in_columns(numpy.ones((7, 3))).shape, (3, 7))

    def test_smoothing_keeps_constants_lines_and_the_first_value(self):
        numpy.testing.assert_allclose(smooth(numpy.full(333, 7.0)), 7.0)
        ramp = numpy.arange(600.0)
        numpy.testing.assert_allclose(smooth(ramp)[:580], ramp[:580])
        noise = numpy.random.default_rng(1).normal(size=600)
        self.assertEqual(smooth(noise)[0], noise[0])
        self.assertLess(smooth(noise)[20:].std(), 0.4)
        self.assertAlmostEqual(smooth(noise)[-1], noise[-11:].mean())
        self.assertEqual(smooth(numpy.array([3.0])).tolist(), [3.0])

    def test_half_a_last_line_is_a_run_in_progress(self):
        path = self.write("a", [step(1), json.dumps(step(2))[:40]], end="")
        self.assertEqual(list(read(path).steps), [1])

    def names(self, *stems, formats=("png", "svg")):
        return [str(self.folder / "out" / f"{stem}.{kind}") for stem in stems for kind in formats]

    def test_pictures(self):
        few = [step(s, 5 - s / 50, [[10 + s, 10, 10, 90 - s]] * 2) for s in range(1, 81)]
        many = [step(s, 5 - s / 40, [[100 + (e * s) % 37 for e in range(32)]] * 3) for s in range(1, 81)]
        dense = [step(s, 5 - s / 60, lr=2e-3) for s in range(1, 81)]
        for line in many:
            line["lr"] = 3e-3
        for name, lines in (("few", few), ("many", many), ("dense", dense)):
            lines.insert(40, validation(40, 4.4))
            lines.insert(41, start(40))
            self.write(name, [start(0, name)] + lines)
        runs = [str(self.folder / name) for name in ("dense", "few", "many")]
        result = subprocess.run(self.command(*runs), capture_output=True, text=True, env=dict(os.environ, MPLCONFIGDIR=str(self.folder / "matplotlib")))
        self.assertEqual((result.returncode, result.stderr.replace("Matplotlib is building the font cache; this may take a moment.\n", "")), (0, ""))
        self.assertEqual(result.stdout.split("\n")[:8], self.names("loss", "training", "experts", "balance"))
        self.assertIn("no run has looked at its experts", result.stdout)
        loss, experts = self.pixels("loss.png"), self.pixels("experts.png")
        self.assertEqual(loss.shape[:2], (645, 1050))    # 7.0 x 4.3 inches at 150 dpi
        self.assertEqual(experts.shape[:2], (960, 1440))  # two runs with experts
        for name in ("loss.png", "training.png"):
            for colour in ("#0072B2", "#D55E00", "#009E73"):  # a line of each run
                rgb = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
                self.assertGreater((abs(self.pixels(name)[..., :3] - rgb).max(axis=-1) < 0.01).sum(), 500, (name, colour))
        for name in self.names("loss", "training", "experts", "balance", formats=["svg"]):
            self.assertEqual(xml.etree.ElementTree.parse(name).getroot().tag, "{http://www.w3.org/2000/svg}svg")
        before = (self.folder / "out/loss.svg").read_bytes()
        (self.folder / "out/loss.png").unlink()
        result = self.draw(*runs, "--format", "svg")
        self.assertEqual(result.stdout.split("\n")[:4], self.names("loss", "training", "experts", "balance", formats=["svg"]))
        self.assertFalse((self.folder / "out/loss.png").exists())
        self.assertEqual((self.folder / "out/loss.svg").read_bytes(), before, "the same run, the same file")

    def test_an_expert_without_tokens_is_black(self):
        """In the row of its layer, the first one lowest, and in its own column; nothing else in the picture is a black area."""
        windows, side = numpy.lib.stride_tricks.sliding_window_view, 20   # letters are thinner
        boxes = {}
        for dead in (None, (0, 0), (1, 3)):   # layer and expert
            counts = [[0 if (layer, expert) == dead else 30 + expert for expert in range(4)] for layer in range(2)]
            run = self.write("a", [start(0), *(step(s, counts=counts) for s in range(1, 21))])
            self.assertEqual(self.draw(run, "--format", "png").returncode, 0)
            black = self.pixels("balance.png")[..., :3].max(axis=-1) == 0
            y, x = numpy.nonzero(windows(windows(black, side, 0).all(axis=-1), side, 1).all(axis=-1))
            self.assertEqual(len(x) > 0, dead is not None, dead)
            if dead:
                boxes[dead] = numpy.array([x.min(), y.min(), numpy.ptp(x) + side, numpy.ptp(y) + side])
        x, y, width, height = boxes[0, 0]
        numpy.testing.assert_allclose(boxes[1, 3], (x + 3 * width, y - height, width, height), atol=3)

    def test_health(self):
        lines = [start(0)] + [step(s, 5 - s / 50, [[10, 20, 30, 40]] * 2) for s in range(1, 41)]
        for s in (0, 20, 40):
            lines.append(look(s, [1, 3], cosine_between=[1 - s / 100, 1 - s / 50], cosine=[0.5, 0.6], distance=[[s / 99] * 4] * 2,
                              entropy=[1.2, 1.3], dead=[0, 1]))
        result = self.draw(self.write("a", lines), self.write("dense", [start(0, "dense"), step(1)]), "--format", "png")
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertEqual(result.stdout.split(), self.names("loss", "training", "experts", "balance", "health", formats=["png"]))
        self.assertEqual(self.pixels("health.png").shape[:2], (870, 1440))   # four panels: all pairs only where there are no copies

    def test_dense_runs_and_a_single_step(self):
        result = self.draw(self.write("dense", [step(1)]))
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertIn("no run has experts", result.stdout)
        self.assertFalse((self.folder / "out/experts.png").exists())
        rgb = numpy.array([0, 0x72, 0xB2]) / 255
        dot = (abs(self.pixels("loss.png")[..., :3] - rgb).max(axis=-1) < 0.01)[80:]   # below the legend
        self.assertGreater(dot.sum(), 20, "one step is a dot")
        result = self.draw(self.write("moe", [step(1, 5.0, [[5, 6]])]), self.write("fine", [step(1, 5.0, [[7] * 32])]),
                           self.write("dead", [step(1, 5.0, [[0, 9]])]), self.write("only-validation", [validation(5, 3.0)]))
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertTrue((self.folder / "out/experts.png").exists())

    def test_more_runs_than_colours(self):
        runs = [self.write(f"run-{i}-with-quite-a-long-name-of-{'many' * (i % 4)}-parts", [step(s, 5 - s / (9 + i)) for s in range(1, 9)]) for i in range(11)]
        result = self.draw(*runs, "--format", "png")
        self.assertEqual((result.returncode, result.stderr), (0, ""))
        self.assertGreater(self.pixels("loss.png").shape[0], 645, "the legend takes room of its own")

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

    def test_equal_labels_and_places_that_cannot_be_written(self):
        a, b = self.write("a", [start(0, "same"), step(1)]), self.write("b", [start(0, "same"), step(1)])
        result = self.draw(a, b)
        self.assertEqual(result.returncode, 2)
        self.assertEqual(result.stderr, f"tools/plots: two runs are called 'same': name them, as in tools/plots 'first={a}' 'second={b}'\n")
        self.assertEqual(self.draw(a, f"other={b}", "--format", "png").returncode, 0)
        (self.folder / "out/loss.png").unlink()
        (self.folder / "out/loss.png").mkdir()
        result = self.draw(a)
        self.assertEqual((result.returncode, result.stderr), (2, f"tools/plots: can't write {self.folder}/out/loss.png: Is a directory\n"))
        (self.folder / "file").write_text("")
        for place in ("file", "file/below"):
            result = self.draw(a, "--out", str(self.folder / place))
            self.assertEqual(result.returncode, 2)
            self.assertIn(f"tools/plots: can't make {self.folder / place}: ", result.stderr)
            self.assertNotIn("Traceback", result.stderr)
        (self.folder / "binary").mkdir()
        (self.folder / "binary/metrics.jsonl").write_bytes(b"\xff\xfe\x00")
        self.assertIn("binary/metrics.jsonl can't be read", self.draw(str(self.folder / "binary")).stderr)


if __name__ == "__main__":
    unittest.main()
