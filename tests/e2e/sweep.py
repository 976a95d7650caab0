#!/usr/bin/env python3
"""upcycle sweep through the executable: plans, runs, is stopped and goes on, says what failed. Usage: sweep.py UPCYCLE [unittest arguments]"""
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
import unittest
import unittest.mock

import tiny_run
from rank_server import served
from tiny_run import MPIRUN, TrainCase, checkpoint, steps_of


def command(process):
    try:
        return (process / "cmdline").read_bytes()
    except OSError:   # it has ended
        return b""


class Sweep(TrainCase):
    def sweep_file(self, arms, name="sweep", steps=6, head="", common=""):
        """A sweep of two ranks in which all arms train `steps` steps."""
        base, _ = self.run_file("base", "[checkpoint]\nevery = 1000\n[validate]\nevery = 3\nbatches = 1\n", steps=steps)
        path = self.root / f"{name}.toml"
        path.write_text(f'[sweep]\nbase = "{base}"\ndirectory = "{self.root / name}"\nranks = 2\nlauncher = "{" ".join(MPIRUN)}"\n{head}\n'
                        f"[set]\n{common}\n{arms}")
        return path, self.root / name

    def plan(self, path, *arguments):
        said = subprocess.run([served(tiny_run.UPCYCLE), "sweep", str(path), "--dry-run", "--json", *arguments], capture_output=True, text=True, cwd=self.root)
        self.assertEqual(said.returncode, 0, said.stderr)
        return {arm["name"]: arm for arm in json.loads(said.stdout)["arms"]}

    def test_plans_runs_and_does_only_what_is_left(self):
        path, runs = self.sweep_file('[[arms]]\ncombine = "zip"\nmoe.experts = [2, 8]\nmoe.granularity = [1, 4]\nmoe.top_k = [2, 4]\n', head="seeds = [1, 2]")
        arms = self.plan(path)
        self.assertFalse(runs.exists(), "--dry-run writes nothing")
        names = ["dense_seed-1", "dense_seed-2", "experts-2_granularity-1_top_k-2_seed-1", "experts-2_granularity-1_top_k-2_seed-2",
                 "experts-8_granularity-4_top_k-4_seed-1", "experts-8_granularity-4_top_k-4_seed-2"]
        self.assertEqual(list(arms), names)
        self.assertEqual([arm["steps"] for arm in arms.values()], [6] * 6)
        self.assertEqual({arm["settings"]["data.seed"] for arm in arms.values()}, {1234}, "the same batches for all")
        said = self.upcycle("sweep", path)
        self.assertIn("6 of 6 arms are done (0 were before)", said)
        self.assertEqual(json.loads((runs / "sweep.json").read_text())["arms"], list(arms.values()))
        first = {name: steps_of(runs / name)[0]["loss"] for name in names}
        self.assertEqual(len(set(f"{loss:.4f}" for loss in first.values())), 1, "all arms start as the dense model, on the same batch")
        validated = [next(json.loads(line) for line in (runs / name / "metrics.jsonl").read_text().splitlines() if '"validation"' in line) for name in names]
        self.assertEqual(len({f"{line['loss']:.4f}" for line in validated}), 1, "and are judged on the same sequences, whatever the seed")
        before = self.tree()
        said = self.upcycle("sweep", path)
        self.assertIn("6 of 6 arms are done (6 were before)", said)
        self.assertEqual(self.tree(), before, "nothing was done again")
        # One job of an array: its run file, and nothing else.
        run_file = self.upcycle("sweep", path, "--arm", "3", "--run-file").strip()
        self.assertEqual(run_file, str(runs / f"{names[3]}.toml"))
        self.refused("sweep", path, "--arm", "6", words=["--arm 6", "0 to 5"])
        # Another sweep does not get this directory, one with more arms does.
        path.write_text(path.read_text().replace("moe.top_k = [2, 4]", "moe.top_k = [1, 4]"))
        self.refused("sweep", path, words=["belongs to another sweep", "experts-2_granularity-1_top_k-2_seed-1"])
        self.assertEqual({f: c for f, c in self.tree().items() if f != path}, {f: c for f, c in before.items() if f != path})

    def amid_an_arm(self, path, runs):
        """The process of a sweep whose first mixture has trained some steps."""
        job = subprocess.Popen([tiny_run.UPCYCLE, "sweep", str(path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.root)
        self.addCleanup(lambda: (job.poll() is None and job.kill(), job.wait(), job.stdout.close()))
        deadline = time.monotonic() + 120
        while len(steps_of(runs / "experts-2_top_k-2")) < 5:
            self.assertTrue(job.poll() is None and time.monotonic() < deadline)
            time.sleep(0.01)
        return job

    def test_killed_its_arm_stops_and_goes_on(self):
        """Nobody is there to ask the arm to stop: it does by itself, and holds its directory no longer."""
        path, runs = self.sweep_file("[[arms]]\nmoe.experts = 2\nmoe.top_k = 2\n", steps=150)
        job = self.amid_an_arm(path, runs)
        job.kill()
        job.wait()
        deadline = time.monotonic() + 60
        while any(str(runs).encode() in command(process) for process in pathlib.Path("/proc").glob("[0-9]*")):
            self.assertLess(time.monotonic(), deadline, "its arm goes on")
            time.sleep(0.1)
        stopped = len(steps_of(runs / "experts-2_top_k-2"))
        self.assertTrue(5 <= stopped < 150 and checkpoint(runs / "experts-2_top_k-2", stopped).is_dir(), stopped)
        said = self.upcycle("sweep", path)
        self.assertIn("2 of 2 arms are done (1 were before)", said)

    def test_stopped_and_goes_on(self):
        path, runs = self.sweep_file("[[arms]]\nmoe.experts = [2, 4]\nmoe.top_k = 2\n", steps=150)
        job = self.amid_an_arm(path, runs)
        job.send_signal(signal.SIGTERM)
        said = job.communicate(timeout=100)[0]
        self.assertEqual(job.returncode, 75, said)
        self.assertIn("experts-2_top_k-2: stopped at step ", said)
        self.assertFalse((runs / "experts-4_top_k-2").exists(), "no further arm was started")
        stopped = len(steps_of(runs / "experts-2_top_k-2"))
        self.assertTrue(checkpoint(runs / "experts-2_top_k-2", stopped).is_dir())
        said = self.upcycle("sweep", path)
        self.assertIn("3 of 3 arms are done (1 were before)", said)
        self.assertIn(f"resuming from {checkpoint(runs / 'experts-2_top_k-2', stopped)}", (runs / "logs/experts-2_top_k-2.log").read_text())

    def test_an_arm_that_cannot_run_and_one_that_fails(self):
        """The others are trained; two arms of one setting give the same bytes."""
        arms = ("[[arms]]\nmoe.experts = 2\nupcycle.noise = [0, 0.0]\n"
                "[[arms]]\nmoe.experts = [5]\nparallel.expert = 2\n"
                '[[arms]]\nmoe.experts = 2\ndata.train = [[1.0, "nowhere"]]\n')
        path, runs = self.sweep_file(arms, head="control = false")
        said = self.upcycle("sweep", path, expect=2)
        self.assertRegex(said, "experts-5_expert-2 +can't run: .*5")
        self.assertRegex(said, r"failed with code 2, after step 0:\n    upcycle: .*nowhere")
        self.assertIn("2 of 4 arms are done (0 were before); 1 can't run; failed: ", said)
        self.assert_same_files(checkpoint(runs / "experts-2_noise-0", 6), checkpoint(runs / "experts-2_noise-0.0", 6))

    def test_arms_that_run_at_a_time_share_the_gpus_out(self):
        telling = self.root / "telling.sh"
        telling.write_text('#!/bin/sh\necho "sees GPUs $CUDA_VISIBLE_DEVICES"\nexec "$@"\n')
        telling.chmod(0o755)
        path, runs = self.sweep_file("[[arms]]\nmoe.experts = [2, 4, 8]\n", head="at_once = 2", steps=2)
        path.write_text(path.read_text().replace('launcher = "', f'launcher = "{telling} '))
        self.enterContext(unittest.mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES="3,5,GPU-c6,7"))
        self.assertIn("4 of 4 arms are done", self.upcycle("sweep", path))
        seen = [re.search("sees GPUs (.*)", log.read_text())[1] for log in sorted((runs / "logs").iterdir())]
        self.assertEqual(set(seen), {"3,5", "GPU-c6,7"})
        self.assertEqual(sorted(seen[:2]), ["3,5", "GPU-c6,7"], "the two that start together")

    @unittest.skipUnless(os.geteuid() == 0, "only root is refused")
    def test_root_is_told_what_mpirun_wants(self):
        path, runs = self.sweep_file("[[arms]]\nmoe.experts = 2\n")
        self.enterContext(unittest.mock.patch.dict(os.environ))
        os.environ.pop("OMPI_ALLOW_RUN_AS_ROOT", None)
        self.refused("sweep", path, words=["for root", "OMPI_ALLOW_RUN_AS_ROOT=1"])
        self.assertFalse(runs.exists())

    def test_a_source_that_vanishes(self):
        path, runs = self.sweep_file("[[arms]]\nmoe.experts = [2, 4]\n")
        self.upcycle("sweep", path, "--arm", "0")
        finished = {file: content for file, content in self.tree().items() if "dense" in str(file)}
        (self.source / "model.safetensors").unlink()
        said = self.upcycle("sweep", path, expect=2)
        self.assertIn("model.safetensors", said)
        self.assertIn("1 of 3 arms are done (1 were before); failed: experts-2, experts-4", said)
        for file, content in finished.items():
            self.assertEqual(file.read_bytes(), content)

    def test_a_source_that_has_to_be_made(self):
        kept = self.root / "kept"
        self.source.rename(kept)
        path, runs = self.sweep_file("[[arms]]\nmoe.experts = 2\n", steps=1, head=f'control = false\nprepare = "cp -r {kept} {self.source}"')
        self.refused("sweep", path, "--dry-run", words=["is missing; the sweep makes it first", "cp -r"])
        self.assertIn("1 of 1 arms are done", self.upcycle("sweep", path))
        path, _ = self.sweep_file("[[arms]]\nmoe.experts = 2\n", name="other", head='prepare = "false"')
        path.write_text(path.read_text().replace("base.toml", "gone.toml"))
        (self.root / "gone.toml").write_text((self.root / "base.toml").read_text().replace(str(self.source), str(self.root / "gone")))
        self.refused("sweep", path, words=['sweep.prepare = "false" failed with code 1'])

    def test_equal_flops_and_equal_time(self):
        path, _ = self.sweep_file("[[arms]]\nmoe.experts = [2, 4]\nmoe.top_k = 2\n", name="flops", steps=60, head='match = "flops"', common="optimizer.warmup = 10")
        arms = self.plan(path)
        spent = {name: arm["steps"] * arm["tokens_per_step"] * arm["flops_per_token"] for name, arm in arms.items()}
        for name, flops in spent.items():
            self.assertLess(abs(flops / spent["dense"] - 1), 0.5 / arms[name]["steps"] + 1e-9, name)
        self.assertLess(arms["experts-4_top_k-2"]["steps"], 60)
        self.assertEqual(arms["experts-4_top_k-2"]["settings"]["optimizer.warmup"], round(10 * arms["experts-4_top_k-2"]["steps"] / 60))
        path, runs = self.sweep_file("[[arms]]\nmoe.experts = 4\nmoe.top_k = 2\n", name="time", steps=40, head='match = "time"\ncalibration_steps = 6')
        self.upcycle("sweep", path)
        rate = {name: sorted(s["tokens_per_second"] for s in steps_of(runs / "calibration" / name)) for name in ("dense", "experts-4_top_k-2")}
        ratio = rate["experts-4_top_k-2"][3] / rate["dense"][3]
        self.assertEqual(len(steps_of(runs / "experts-4_top_k-2")), max(1, round(40 * ratio)))
        self.assertEqual(len(steps_of(runs / "dense")), 40)
        self.refused("sweep", self.sweep_file("[[arms]]\ntrain.steps = [4, 5]\n", head='match = "flops"')[0], words=["sweep.match chooses the steps", "train.steps"])

    def test_mistakes(self):
        for arms, head, words in [("[[arms]]\nmoe.exprts = [2]\n", "", ["sweep.toml:", "moe.exprts", "did you mean 'moe.experts'?"]),
                                  ("[[arms]]\nmoe.experts = []\n", "", ["moe.experts = []"]),
                                  ("[[arms]]\nmoe.experts = 2\n[[exclude]]\nmoe.experts = 2\n", "", ["no arm is left"]),
                                  ("[[arms]]\nmoe.experts = 2\n", "at_once = 0", ["a number from 1 on"]),
                                  ("[[arms]]\nmoe.experts = 2\n", 'control = "yes"', ["true or false"])]:
            path, _ = self.sweep_file(arms, head=head)
            self.refused("sweep", path, words=words)
        path, runs = self.sweep_file("[[arms]]\nmoe.experts = 2\n")
        runs.mkdir()
        (runs / "thesis.tex").write_text("x")
        self.refused("sweep", path, words=["holds files, but no sweep"])
        path.write_text(path.read_text().replace(str(runs), "/proc/runs"))
        self.refused("sweep", path, words=["sweep.directory = /proc/runs can't be made"])
        (self.root / "base.toml").write_text("[run]\nnmae = 3\n")
        self.refused("sweep", path, words=["base.toml", "run.nmae"])
        said = subprocess.run([*MPIRUN, "-np", "2", tiny_run.UPCYCLE, "sweep", str(path)], capture_output=True, text=True, env=os.environ)
        self.assertIn("run it without mpirun", said.stderr)


if __name__ == "__main__":
    tiny_run.UPCYCLE = os.path.abspath(sys.argv.pop(1))
    unittest.main()
