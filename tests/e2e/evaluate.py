#!/usr/bin/env python3
"""upcycle evaluate: the numbers of training's own validation, of source and checkpoints, on any layout; nothing is written.
Usage: evaluate.py UPCYCLE [unittest arguments]"""
import json
import os
import shutil
import sys
import unittest

import numpy as np

import tiny_run
from check_schema import digest_of
from tiny_run import MOE, VOCAB, TrainCase, checkpoint, write_tokens

VALIDATE = "[validate]\nevery = 6\nbatches = 2\n[optimizer]\nlr = 1e-2\nschedule = \"constant\"\n"


class Evaluate(TrainCase):
    def evaluate(self, *arguments, ranks=1):
        before = self.tree()
        result = self.upcycle("evaluate", *arguments, "--json", "--log-level", "error", ranks=ranks)
        self.assertEqual(self.tree(), before, "something was written")
        return json.loads(result)

    def losses(self, *arguments, ranks=1):
        return {model["model"]: model["loss"] for model in self.evaluate(*arguments, ranks=ranks)["models"]}

    @staticmethod
    def validations(run):
        lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in lines if line["kind"] == "validation"}

    def test_is_what_training_says(self):
        for precision in ("fp32", "bf16"):
            with self.subTest(precision):
                run_file, run = self.run_file(f"run-{precision}", MOE + VALIDATE, precision=precision)
                alone = self.losses(run_file)
                self.assertEqual(list(alone), ["dense"], "before there is a checkpoint")
                self.upcycle("train", run_file)
                said = self.validations(run)
                self.assertEqual(sorted(said), [0, 6])
                found = self.evaluate(run_file)
                self.assertEqual(found["tokens"], 2 * 8 * 16)
                models = {model["model"]: model for model in found["models"]}
                self.assertEqual(list(models), ["dense", "step 0", "step 6"])
                for step in (0, 6):
                    self.assertAlmostEqual(models[f"step {step}"]["loss"], said[step], delta=1e-6)
                self.assertGreater(abs(said[6] - said[0]), 1e-2, "training changed nothing: nothing was proved")
                self.assertEqual(models["dense"]["loss"], alone["dense"])
                self.assertAlmostEqual(models["dense"]["loss"], said[0], delta=1e-5 if precision == "fp32" else 2e-3)
                self.assertAlmostEqual(models["step 6"]["difference"], models["step 6"]["loss"] - models["dense"]["loss"])
                self.assertAlmostEqual(models["step 6"]["perplexity"], float(np.exp(models["step 6"]["loss"])))

    def test_any_layout(self):
        run_file, run = self.run_file("run", MOE + VALIDATE)
        self.upcycle("train", run_file)
        one = self.losses(run_file)
        for layout in (["parallel.expert=2"], ["parallel.tensor=2"], ["parallel.pipeline=2"], ["parallel.context=2"], ["parallel.expert_tensor=2"], []):
            with self.subTest(layout=layout):
                two = self.losses(run_file, *(["--set", *layout] if layout else []), ranks=2)
                self.assertEqual(list(two), list(one))
                for model, loss in one.items():
                    self.assertAlmostEqual(two[model], loss, delta=1e-6)

    def test_biases_choose_experts_here_too(self):
        run_file, run = self.run_file("run", MOE + VALIDATE + "[balance]\nbias_rate = 0.5\n", steps=5)   # odd: no bias is back at 0
        self.upcycle("train", run_file)
        self.assertAlmostEqual(self.losses(run_file)["step 5"], self.validations(run)[5], delta=1e-6)
        manifest = checkpoint(run, 5) / "manifest.json"
        content = json.loads(manifest.read_text())
        del content["training"]["routers"]
        manifest.write_text(json.dumps(content | {"digest": digest_of(content)}))
        self.assertGreater(abs(self.losses(run_file)["step 5"] - self.validations(run)[5]), 1e-4, "the biases mattered")

    def test_other_data_and_fewer_batches(self):
        run_file, run = self.run_file("run", MOE + VALIDATE)
        random = np.random.default_rng(1)
        write_tokens(self.root / "held-out", [random.integers(0, VOCAB, 700) for _ in range(3)])
        usual = self.evaluate(run_file)
        other = self.evaluate(run_file, "--data", self.root / "held-out", "--batches", "1")
        self.assertEqual((usual["tokens"], other["tokens"]), (256, 128))
        same = self.evaluate(run_file, "--batches", "1", "--set", f'data.validation=[[1.0, "{self.root / "held-out"}"]]')
        self.assertEqual(other["models"], same["models"])
        self.assertNotEqual(other["models"], usual["models"])

    def test_while_the_run_is_going(self):
        run_file, run = self.run_file("run", MOE + VALIDATE + "[checkpoint]\nevery = 6\nkeep = 100000\n", steps=100000)
        job = self.start("train", run_file, run=run, after=20)
        said = json.loads(self.upcycle("evaluate", run_file, "--json", "--log-level", "error"))
        job.terminate()
        self.finish(job, 75)
        newest = said["models"][-1]
        step = int(newest["model"].removeprefix("step "))
        self.assertTrue(step > 0 and step % 6 == 0, newest)
        self.assertAlmostEqual(newest["loss"], self.validations(run)[step], delta=1e-6)

    def test_random_runs_and_tables(self):
        run_file, run = self.run_file("run", MOE + VALIDATE, source=f'architecture = "{self.source}/config.json"')
        self.refused("evaluate", run_file, words=["nothing to evaluate", "has no checkpoint yet"])
        self.upcycle("train", run_file)
        self.assertEqual(list(self.losses(run_file)), ["step 0", "step 6"])
        self.assertIn("to step 0", self.upcycle("evaluate", run_file))
        run_file, run = self.run_file("other", MOE + VALIDATE)
        said = self.upcycle("evaluate", run_file)
        self.assertRegex(said, r"(?m)^model +tokens +nats/token +perplexity +to dense$")
        self.assertRegex(said, r"(?m)^dense +256 +\d\.\d{6} ")
        self.assertIn("the run has no checkpoint yet", said)

    def test_refusals(self):
        run_file, run = self.run_file("run", MOE + VALIDATE)
        self.upcycle("train", run_file)
        self.refused("evaluate", run_file, "--set", "moe.experts=16", words=["belongs to another run: moe.experts: 8 there, 16 here"])
        self.refused("evaluate", run_file, "--data", self.root / "absent", words=["absent.idx: no such file"])
        self.refused("evaluate", run_file, "--batches", "0", words=["--batches 0: a positive integer is expected"])
        self.refused("evaluate", run_file, "--set", "train.micro_batch=3", words=["train.micro_batch = 3 does not divide train.global_batch = 8"])
        self.refused("evaluate", run_file, "--set", "parallel.expert=3", ranks=3, words=["the run does not divide on 3 ranks"])
        shutil.rmtree(self.source)
        self.refused("evaluate", run_file, words=["not a directory"])


if __name__ == "__main__":
    tiny_run.UPCYCLE = os.path.abspath(sys.argv.pop(1))
    unittest.main()
