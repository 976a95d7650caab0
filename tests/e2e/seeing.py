#!/usr/bin/env python3
"""What a run shows of itself: event files through TensorBoard's own readers, looks at the experts, the summary at the end.
Usage: seeing.py UPCYCLE [unittest arguments]"""
import json
import os
import resource
import shutil
import signal
import sys
import time
import unittest

import numpy as np
import tiny_run
from tiny_run import LAYERS, MOE, TrainCase, steps_of

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as PluginAccumulator
from tensorboard.util import tb_logging, tensor_util

tb_logging.get_logger().setLevel("ERROR")   # it tells of every purge
TAGS = {"train/loss": "loss", "train/learning_rate": "lr", "train/gradient_norm": "grad_norm", "speed/tokens_per_second": "tokens_per_second",
        "speed/tflops": "tflops", "balance/aux_loss": "aux_loss", "balance/z_loss": "z_loss", "balance/router_entropy": "router_entropy",
        "balance/load_max_over_mean": "load_max_over_mean", "balance/dead_experts": "dead_experts", "balance/dropped": "dropped"}
LOG = "[log]\ntensorboard = true\nexperts_every = 5\n"


def lines_of(run, kind):
    """The lines that count: a start takes back later steps."""
    kept = {}
    for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()):
        if line["kind"] == "start":
            kept = {step: old for step, old in kept.items() if step <= line["step"]}
        elif line["kind"] == kind:
            kept[line["step"]] = line
    return [kept[step] for step in sorted(kept)]


def curves(run):
    """By both readers of TensorBoard: the one of scalars, and the one it serves its pages from."""
    scalars = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tensors = PluginAccumulator(str(run / "tensorboard"), size_guidance={"tensors": 0}).Reload()
    first = {tag: [(event.step, event.value) for event in scalars.Scalars(tag)] for tag in scalars.Tags()["scalars"]}
    second = {tag: [(event.step, float(tensor_util.make_ndarray(event.tensor_proto))) for event in tensors.Tensors(tag)]
              for tag in tensors.Tags()["tensors"]}
    return first, second


class TensorBoard(TrainCase):
    def assert_curves(self, run, steps):
        """Each step once, with the value that metrics.jsonl has, as a float."""
        rows = lines_of(run, "step")
        self.assertEqual([row["step"] for row in rows], list(range(1, steps + 1)))
        wanted = {tag: [(row["step"], np.float32(row[key])) for row in rows] for tag, key in TAGS.items()}
        validations = lines_of(run, "validation")
        wanted["validation/loss"] = [(row["step"], np.float32(row["loss"])) for row in validations]
        looks = lines_of(run, "experts")
        for tag, key in (("cosine", "cosine"), ("cosine_between_copies", "cosine_between"), ("cosine_inside_copies", "cosine_inside"),
                         ("distance_to_dense", "distance")):
            wanted["experts/" + tag] = [(row["step"], np.float32(np.mean(row[key]))) for row in looks]
        wanted["experts/dead"] = [(row["step"], np.float32(np.sum(row["dead"]))) for row in looks if row["steps"]]
        wanted["experts/router_entropy"] = [(row["step"], np.float32(np.mean(row["entropy"]))) for row in looks if row["steps"]]
        for found in curves(run):
            self.assertEqual(sorted(found), sorted(wanted))
            for tag, points in wanted.items():
                self.assertEqual([step for step, _ in found[tag]], [step for step, _ in points], tag)
                np.testing.assert_allclose([value for _, value in found[tag]], [value for _, value in points], rtol=3e-7, err_msg=tag)

    def test_stopped_killed_and_resumed(self):
        """By a signal, then by kill -9 behind the newest checkpoint, so that steps are computed twice; each is shown once."""
        extra = MOE + LOG + "[parallel]\nexpert = 2\n[checkpoint]\nevery = 10\n[validate]\nevery = 6\nbatches = 1\n"
        path, run = self.run_file("run", extra, steps=60, global_batch=16)
        began = time.time()
        job = self.start("train", path, run=run, ranks=2, after=3)
        job.send_signal(signal.SIGUSR2)
        self.finish(job, 75)
        stopped = len(steps_of(run))
        self.assertLess(stopped, 30, "the signal came too late")
        self.assert_curves(run, stopped)

        job = self.start("train", path, run=run, ranks=2, after=33 - stopped)
        os.kill(self.ranks_of(job)[0], signal.SIGKILL)
        job.wait(timeout=60)
        killed = [row["step"] for row in steps_of(run)]
        self.assertGreater(killed[-1], 30)
        half = (run / "metrics.jsonl").read_text()
        (run / "metrics.jsonl").write_text(half + '{"kind":"step","step":')   # as if it had been killed while writing
        newest = max((run / "tensorboard").iterdir())
        newest.write_bytes(newest.read_bytes() + b"\x20\0\0\0\0\0\0\0half a record")
        self.assertIn("resuming from", self.upcycle("train", path, ranks=1, *["--set", "parallel.expert=1"]))
        self.assertGreater(len(steps_of(run)), 60, "no step was computed twice: this shows nothing")
        self.assert_curves(run, 60)

        files = sorted((run / "tensorboard").iterdir())
        self.assertEqual(len(files), 3)
        for file, first in zip(files, (0, stopped + 1, None)):
            events = list(EventFileLoader(str(file)).Load())
            self.assertEqual(events[0].file_version, "brain.Event:2")
            self.assertEqual(events[1].session_log.status, 1)   # START
            self.assertIn(events[1].step, (first,) if first is not None else (31, 41))
            times = [event.wall_time for event in events]
            self.assertEqual(times, sorted(times))
            self.assertTrue(began - 1 <= times[0] and times[-1] <= time.time())

    def test_a_dense_model_and_steps_that_are_not_finite(self):
        path, run = self.run_file("run", '[log]\ntensorboard = true\n[optimizer]\nlr = 1e30\nschedule = "constant"\n', nan_limit=3, rollbacks=0)
        self.upcycle("train", path, expect=1)
        for found in curves(run):
            self.assertEqual(sorted(found), sorted(tag for tag in TAGS if not tag.startswith("balance")))
            self.assertEqual([step for step, _ in found["train/loss"]], [1, 2, 3, 4])
            self.assertFalse(np.isfinite([value for _, value in found["train/gradient_norm"][1:]]).any())

    def test_nothing_unless_asked_for(self):
        path, run = self.run_file("run", "[log]\nexperts_every = 0\n" + MOE)
        self.upcycle("train", path)
        self.assertFalse((run / "tensorboard").exists())
        self.assertEqual(lines_of(run, "experts"), [])

    def test_a_full_disk(self):
        """Of the event file alone: metrics.jsonl, which has longer lines, is led elsewhere."""
        path, run = self.run_file("run", "[log]\ntensorboard = true\n", steps=1000000)
        run.mkdir()
        self.upcycle("train", path, "--set", "train.steps=1")
        (run / "metrics.jsonl").unlink()
        (run / "metrics.jsonl").symlink_to("/dev/null")
        job = tiny_run.subprocess.Popen(self.command("train", path, "--accept-changes", ranks=2), stdout=tiny_run.subprocess.PIPE,
                                        stderr=tiny_run.subprocess.STDOUT, text=True)
        self.addCleanup(lambda: (job.poll() is None and job.kill(), job.wait(), job.stdout.close()))
        deadline = time.monotonic() + 60
        while len(list((run / "tensorboard").iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.02)
        resource.prlimit(self.ranks_of(job)[0], resource.RLIMIT_FSIZE, (4_000, 4_000))
        said = self.finish(job, 2)
        self.assertEqual(said.count("upcycle: "), 1, said)
        self.assertIn("writing", said)
        self.assertIn("tensorboard/events.out.tfevents.", said)
        newest = max((run / "tensorboard").iterdir())
        self.assertEqual(newest.stat().st_size, 4_000)
        steps = [event.step for event in EventFileLoader(str(newest)).Load() if event.HasField("summary")]
        self.assertEqual(steps, list(range(2, 2 + len(steps))))
        self.assertGreater(len(steps), 10)


class Experts(TrainCase):
    def test_what_a_look_tells(self):
        """The load since the last look from the steps; fresh copies are the dense model; a stop in between changes nothing."""
        extra = MOE + "[log]\nexperts_every = 25\n[parallel]\nexpert = 2\n[optimizer]\nlr = 3e-3\nschedule = \"constant\"\n"
        path, run = self.run_file("run", extra, steps=60, global_batch=16)
        job = self.start("train", path, run=run, ranks=2, after=4)
        job.send_signal(signal.SIGUSR2)
        self.finish(job, 75)
        self.assertIn(len(steps_of(run)), range(4, 25), "stopped between two looks")
        self.upcycle("train", path, ranks=2)
        straight_path, straight = self.run_file("straight", extra, steps=60, global_batch=16)
        self.upcycle("train", straight_path, ranks=2)
        looks = {row["step"]: row for row in lines_of(straight, "experts")}
        self.assertEqual(sorted(looks), [0, 25, 50, 60])
        steps = {row["step"]: row for row in steps_of(straight)}
        first = looks[0]
        self.assertEqual((first["layers"], first["steps"]), ([0, 1], 0))
        self.assertNotIn("load", first)
        np.testing.assert_allclose(first["cosine_between"], [1, 1], atol=1e-6)
        self.assertEqual(first["distance"], [[0.0] * 8] * LAYERS)
        self.assertLess(max(map(abs, first["cosine_inside"])), 0.3)
        for begin, end in ((0, 25), (25, 50), (50, 60)):
            look = looks[end]
            tokens = np.sum([steps[step]["tokens_per_expert"] for step in range(begin + 1, end + 1)], axis=0)
            self.assertEqual(look["steps"], end - begin)
            np.testing.assert_allclose(look["load"], tokens / tokens.sum(axis=1, keepdims=True), rtol=1e-12)
            self.assertEqual(look["dead"], (tokens == 0).sum(axis=1).tolist())
            entropy = np.mean([steps[step]["router_entropy_by_layer"] for step in range(begin + 1, end + 1)], axis=0)
            np.testing.assert_allclose(look["entropy"], entropy, rtol=1e-12)
        for step in steps.values():
            self.assertAlmostEqual(np.mean(step["router_entropy_by_layer"]), step["router_entropy"], places=12)
        between, distance = ([np.mean(looks[step][key]) for step in sorted(looks)] for key in ("cosine_between", "distance"))
        self.assertEqual(between, sorted(between, reverse=True), "copies drift apart")
        self.assertEqual(distance, sorted(distance))
        self.assertGreater(distance[1], 0.01)
        resumed = {row["step"]: row for row in lines_of(run, "experts")}
        self.assertEqual(resumed, looks)

    def test_where_they_come_from(self):
        """Unknown for a random start; through a checkpoint; until the source is moved away, which the log tells once."""
        path, random = self.run_file("random", MOE + "[log]\nexperts_every = 3\n", source=f'architecture = "{self.source / "config.json"}"')
        self.upcycle("train", path)
        for row in lines_of(random, "experts"):
            self.assertEqual(sorted(set(row) - {"kind", "step", "tokens", "steps", "layers", "load", "dead", "entropy"}), ["cosine"])
            self.assertLess(max(map(abs, row["cosine"])), 0.1)

        path, run = self.run_file("run", MOE + "[log]\nexperts_every = 3\n")
        self.upcycle("train", path)
        path, following = self.run_file("following", "[log]\nexperts_every = 2\n", source=f'model = "{run}"')
        self.upcycle("train", path, "--set", "train.steps=2")
        end, begin = lines_of(run, "experts")[-1], lines_of(following, "experts")[0]
        self.assertEqual((begin["cosine_between"], begin["distance"]), (end["cosine_between"], end["distance"]))
        self.assertGreater(min(end["distance"][0]), 0)

        shutil.move(self.source, self.root / "moved")
        said = self.upcycle("train", path, "--accept-changes", ranks=2)
        self.assertEqual(said.count("the experts' distance to their source is left out of metrics.jsonl"), 1, said)
        self.assertIn(str(self.source), said)
        looks = lines_of(following, "experts")
        self.assertEqual([row["step"] for row in looks], [0, 2, 4, 6])
        self.assertEqual(["distance" in row for row in looks], [True, True, False, False])
        self.assertTrue(all("cosine_between" in row for row in looks))
        tensors = tiny_run.dense_tensors()
        del tensors["model.norm.weight"]
        tiny_run.make_dense(self.source, tensors)   # other files under the same name
        self.assertIn("these are not the files of step 0 any more", self.upcycle("train", path, "--set", "train.steps=8", "--accept-changes"))


class Summary(TrainCase):
    def test_on_one_screen(self):
        path, run = self.run_file("eight", MOE + LOG + "[validate]\nevery = 5\nbatches = 1\n", steps=12)
        self.upcycle("train", path, "--set", "train.steps=7")
        said = self.upcycle("train", path, "--accept-changes", ranks=2)   # twelve steps after all: the cosine falls more slowly
        summary = said[said.index("done: eight, 12 steps"):].rstrip().splitlines()
        self.assertLess(len(summary), 20)
        self.assertLess(max(map(len, summary)), 220)
        rows = {line[2:16].strip(): line[17:] for line in summary[1:] if line[2:16].strip()}
        steps, validations = lines_of(run, "step"), lines_of(run, "validation")
        self.assertEqual(rows["tokens"], f"{steps[-1]['tokens']:,}")
        self.assertIn("in 2 starts", rows["time"])
        rate = sorted(step["tokens_per_second"] for step in steps)[6]
        self.assertTrue(rows["speed"].startswith(f"{round(rate):,} tokens/s"), rows["speed"])
        self.assertEqual(rows["loss"], f"{steps[0]['loss']:.4f} at step 1 -> {steps[-1]['loss']:.4f} at step 12")
        self.assertTrue(rows["validation"].startswith(f"{validations[0]['loss']:.4f} at step 0 -> {validations[-1]['loss']:.4f} at step 12"))
        best = min(validations, key=lambda row: row["loss"])
        self.assertIn("the best" if best is validations[-1] else f"best {best['loss']:.4f} at step {best['step']}", rows["validation"])
        norms = [step["grad_norm"] for step in steps]
        self.assertTrue(rows["gradient norm"].startswith(f"{min(norms):.3g} to {max(norms):.3g}, median "))
        self.assertIn(f"fullest / mean {steps[-1]['load_max_over_mean']:.2f}", rows["experts"])
        self.assertIn(f"{np.mean(lines_of(run, 'experts')[-1]['cosine_between']):.4f} between copies", rows["expert weights"])
        self.assertRegex(rows["peak memory"], r"planned in tensors: \d+ MiB")
        self.assertEqual(rows["checkpoint"], str(tiny_run.checkpoint(run, 12)))
        self.assertIn(f"upcycle export {run} DIRECTORY", said)
        self.assertIn(f"tools/plots {run} --out {run}/plots", said)
        self.assertIn(f"tensorboard --logdir {run}/tensorboard", said)

    def test_shorter_when_stopped(self):
        path, run = self.run_file("run", steps=100000)
        job = self.start("train", path, run=run, ranks=2)
        job.send_signal(signal.SIGUSR2)
        said = self.finish(job, 75)
        done = len(steps_of(run))
        summary = said[said.index("stopped on request after step"):].rstrip().splitlines()
        self.assertTrue(summary[0].startswith(f"stopped on request after step {done} of 100000"), summary[0])
        self.assertEqual([line[2:16].strip() for line in summary[1:7]], ["tokens", "time", "speed", "loss", "checkpoint", "next"])
        self.assertIn("the same command goes on from here (exit code 75)", summary[6])
        self.assertNotIn("tools/plots", said)


if __name__ == "__main__":
    tiny_run.UPCYCLE = os.path.abspath(sys.argv.pop(1))
    unittest.main()
