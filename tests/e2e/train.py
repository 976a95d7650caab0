#!/usr/bin/env python3
"""upcycle train from start to end: stopped and resumed, on other numbers of ranks, from every kind of source, out to transformers.
Usage: train.py UPCYCLE [unittest arguments]"""
import json
import os
import signal
import sys
import time
import unittest

import numpy as np
import tiny_run
from safetensors.numpy import load_file
from seal import seal
from tiny_run import LAYERS, MOE, SEQUENCE, VOCAB, TrainCase, checkpoint, dense_tensors, make_dense, steps_of, write_tokens

ON_TWO = MOE + "[parallel]\nexpert = 2\n"


def numbers_of(run):
    """What a step computed, not how long it took."""
    timing = ("seconds", "tokens_per_second", "tflops", "slowest_rank", "seconds_of_rank")
    return [{key: value for key, value in line.items() if key not in timing} for line in steps_of(run)]


class StopAndResume(TrainCase):
    STEPS = 60

    def stopped_and_resumed(self, directory, extra, stop, ranks=2, **settings):
        """Stops by `stop(job)` between two checkpoints, resumes with the same command; returns the run directory."""
        path, run = self.run_file(directory, extra, steps=self.STEPS, global_batch=16, **settings)
        job = self.start("train", path, run=run, ranks=ranks)
        stop(job)
        said = self.finish(job, 75)
        self.assertIn("the same command goes on from here", said)
        done = len(steps_of(run))
        self.assertLess(done, self.STEPS, "the signal came too late to show anything")
        self.assertTrue(checkpoint(run, done).is_dir())
        self.assertIn(f"resuming from {checkpoint(run, done)}", self.upcycle("train", path, ranks=ranks))
        return run

    def uninterrupted(self, extra, **settings):
        path, run = self.run_file("straight", extra, steps=self.STEPS, global_batch=16, **settings)
        self.upcycle("train", path, ranks=2)
        return run

    def assert_same_run(self, straight, resumed, masters):
        last = (checkpoint(straight, self.STEPS), checkpoint(resumed, self.STEPS))
        files = self.assert_same_files(*last)
        self.assertEqual(files, ["weights.h5"] + ["masters.h5"] * masters + ["exp_avg.h5", "exp_avg_sq.h5"])
        training = [json.loads((step / "manifest.json").read_text())["training"] for step in last]
        self.assertEqual(*training)
        self.assertEqual(training[0]["position"], self.STEPS * 16)
        self.assertEqual([line["step"] for line in numbers_of(resumed)], list(range(1, self.STEPS + 1)))
        self.assertEqual(numbers_of(resumed), numbers_of(straight))

    def test_fp32_by_two_signals(self):
        """USR2 by way of mpirun; TERM to one rank alone, whose wish the others share."""
        straight = self.uninterrupted(ON_TWO)
        usr2 = self.stopped_and_resumed("usr2", ON_TWO, lambda job: job.send_signal(signal.SIGUSR2))
        self.assert_same_run(straight, usr2, masters=False)
        term = self.stopped_and_resumed("term", ON_TWO, lambda job: os.kill(self.ranks_of(job)[1], signal.SIGTERM))
        self.assert_same_run(straight, term, masters=False)

    def test_bf16_by_a_signal_of_ones_own(self):
        data = 'train = [[2.0, "text"], [1.0, "mock"]]\nvalidation = "mock"'
        random = np.random.default_rng(1)
        write_tokens(self.root / "text", [random.integers(0, VOCAB, n) for n in random.integers(5, 60, 200)])
        # What routers remember from step to step is stored, too.
        balance = '[balance]\nscope = "global"\nbias_rate = 0.01\njitter = 0.02\n'
        extra = 'signal = "USR1"\n' + ON_TWO + balance + "[validate]\nevery = 7\nbatches = 1\n[checkpoint]\nevery = 25\n"
        straight = self.uninterrupted(extra, precision="bf16", data=data)
        resumed = self.stopped_and_resumed("usr1", extra, lambda job: job.send_signal(signal.SIGUSR1), precision="bf16", data=data)
        self.assert_same_run(straight, resumed, masters=True)
        routers = json.loads((checkpoint(resumed, self.STEPS) / "manifest.json").read_text())["training"]["routers"]
        self.assertEqual([(len(routers[layer]["bias"]), sum(routers[layer]["count"])) for layer in ("0", "1")], [(8, 16 * SEQUENCE * 4)] * 2)
        self.refused("export", resumed, self.root / "out", words=["the router of layer 0 has a balancing bias", "qwen3_moe"])
        # A run that starts from this checkpoint goes on with its biases.
        path, following = self.run_file("following", steps=1, source=f'model = "{resumed}"')
        self.upcycle("train", path)
        for step in (0, 1):
            stored = json.loads((checkpoint(following, step) / "manifest.json").read_text())["training"]["routers"]
            self.assertEqual({layer: router["bias"] for layer, router in stored.items()},
                             {layer: router["bias"] for layer, router in routers.items()})

    def test_other_numbers_of_ranks(self):
        extra = MOE + "[optimizer]\nschedule = \"constant\"\nlr = 1e-3\n"
        path, straight = self.run_file("straight", extra, steps=9)
        self.upcycle("train", path, ranks=1)
        path, run = self.run_file("moved", extra)
        for ranks, layout, steps in ((4, "parallel.expert=4", 3), (2, "parallel.pipeline=2", 6), (1, "parallel.expert=1", 9)):
            said = self.upcycle("train", path, "--set", layout, f"train.steps={steps}", ranks=ranks)
            self.assertRegex(said, rf"; {ranks} ranks \(.*\) on .*, tensors by MPI\n")
        self.assertEqual([line["step"] for line in steps_of(run)], list(range(1, 10)))
        starts = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if '"start"' in line]
        self.assertEqual([(line["step"], line["ranks"]) for line in starts], [(0, 4), (3, 2), (6, 1)])
        for line in steps_of(run):
            self.assertEqual([sum(layer) for layer in line["tokens_per_expert"]], [8 * SEQUENCE * 4] * LAYERS)
        for a, b in zip(steps_of(straight), steps_of(run)):
            self.assertEqual(a["tokens"], b["tokens"])
            self.assertLess(abs(a["loss"] - b["loss"]) / a["loss"], 1e-6 if a["step"] <= 5 else 1e-5)

    def test_what_routers_remember_on_other_layouts(self):
        """Biases and counts, of which each stage of a pipeline has its own layers', are those of a run on one rank."""
        extra = ("[moe]\nexperts = 8\ntop_k = 2\n[upcycle]\nrouter_logit_std = 1.0\n[balance]\nscope = \"global\"\nbias_rate = 0.01\n"
                 "[optimizer]\nschedule = \"constant\"\nlr = 1e-3\n[checkpoint]\nevery = 3\nkeep = 9\n")
        path, straight = self.run_file("straight", extra, steps=9)
        self.upcycle("train", path)
        path, moved = self.run_file("moved", extra)
        for ranks, layout, steps in ((2, "pipeline", 3), (1, "pipeline", 6), (2, "expert", 9)):
            self.upcycle("train", path, "--set", f"parallel.{layout}={ranks}", f"train.steps={steps}", ranks=ranks)
        for step in (3, 6, 9):
            routers, expected = ({layer: (router["bias"], router["count"]) for layer, router in
                                  json.loads((checkpoint(run, step) / "manifest.json").read_text())["training"]["routers"].items()}
                                 for run in (moved, straight))
            self.assertEqual(routers, expected, step)
            self.assertEqual(sorted(routers), ["0", "1"])
            for bias, count in routers.values():
                self.assertEqual((len(bias), sum(count)), (8, 8 * SEQUENCE * 2))
                self.assertTrue(any(bias), "no bias has moved")

    def test_seconds_of_a_step_are_its_own(self):
        """Also of the last one before a validation, whose numbers are read at once, not one step late."""
        path, run = self.run_file("run", "[validate]\nevery = 3\nbatches = 1\n", steps=12)
        began = time.monotonic()
        self.upcycle("train", path, ranks=2)
        seconds = sorted(step["seconds"] for step in steps_of(run))
        self.assertGreater(seconds[0], seconds[6] / 20)
        self.assertLess(sum(seconds), time.monotonic() - began)


class StepZero(TrainCase):
    def test_the_same_bytes_on_any_number_of_ranks(self):
        orders = {f"{order}-{extra and 'disturbed'}": f'[upcycle]\npermutation = "{order}"\n{extra}'
                  for order in ("random", "clusters") for extra in ("", "noise = 0.05\n")}
        recipes = orders | {"shards": "", "noise-and-drop": '[upcycle]\nnoise = 0.05\ndrop = 0.25\ndrop_indices = "per-matrix"\n'}
        for name, recipe in recipes.items():
            steps = []
            for ranks, pipeline in ((1, 1), (2, 1), (4, 1), (4, 2)) if name not in orders else ((1, 1), (2, 1), (4, 2)):
                tensor = "tensor = 2\nexpert_tensor = 2\n" if name in orders and ranks == 4 else ""
                parallel = f"[parallel]\npipeline = {pipeline}\nexpert = {ranks // pipeline if not tensor else 1}\n{tensor}"
                path, run = self.run_file(f"{name}-{ranks}-{pipeline}", MOE + recipe + parallel, steps=1, precision="bf16")
                self.upcycle("train", path, ranks=ranks)
                steps.append(checkpoint(run, 0))
            for other in steps[1:]:
                with self.subTest(recipe=name, run=other.parent.parent.name):
                    self.assertIn("masters.h5", self.assert_same_files(steps[0], other))
            for step in steps:
                told = json.loads((step / "certificate.json").read_text())
                expected = "destructive" if "drop" in recipe else "approximate" if "noise" in recipe else "exact"
                self.assertEqual((told["verdict"], told["expected"]), ("passed", expected))
                self.assertEqual(told["recipe"]["permutation"], name.split("-")[0] if name in orders else "identity")
                self.assertEqual((step / "clusters.json").exists(), name.startswith("clusters"))
                if name.startswith("clusters"):
                    clusters = json.loads((step / "clusters.json").read_text())
                    self.assertEqual({layer: sorted(units) for layer, units in clusters.items()},
                                     {str(layer): list(range(tiny_run.FFN)) for layer in range(LAYERS)})

    def test_a_certificate_that_fails(self):
        """A weight that the factor of an exact upcycle carries past fp32's largest number."""
        tensors = dense_tensors()
        tensors["model.layers.1.mlp.up_proj.weight"][5, 7] = 2.5e38
        make_dense(self.source, tensors)
        for name, parallel in ("data", ""), ("pipeline", "[parallel]\npipeline = 2\n"):
            path, run = self.run_file(name, MOE + parallel)
            said = self.upcycle("train", path, ranks=2, expect=1)
            self.assertIn("the certificate failed", said)
            self.assertEqual(json.loads((run / "certificate.json").read_text())["verdict"], "failed")
            self.assertEqual(list((run / "checkpoints").iterdir()), [], "an upcycle that failed was stored")

    def test_verify_reads_the_verdict(self):
        path, run = self.run_file("run", MOE, steps=1)
        self.upcycle("train", path)
        self.assertIn("certificate passed", self.upcycle("verify", run))
        stored = checkpoint(run, 1) / "certificate.json"
        stored.write_text(stored.read_text().replace('"verdict": "passed"', '"verdict": "failed"'))
        seal(stored.parent)
        self.assertIn("the certificate failed", self.upcycle("verify", run, expect=1))


class NotFinite(TrainCase):
    EXTRA = '[optimizer]\nlr = 1e30\nschedule = "constant"\n[checkpoint]\nevery = 1\nkeep = 9\n'

    def test_skip_then_stop(self):
        path, run = self.run_file("run", self.EXTRA, nan_limit=3, rollbacks=0)
        said = self.upcycle("train", path, ranks=2, expect=1)
        self.assertIn("the gradient was not finite for 3 steps in a row, last at step 4; the newest checkpoint is of step 3", said)
        self.assertIn("step 2: the gradient was not finite; the step was skipped", said)
        self.assertEqual([line["skipped"] for line in steps_of(run)], [False, True, True, True])
        self.assertIsNone(steps_of(run)[1]["grad_norm"])
        for step in (2, 3):
            self.assertEqual(len(self.assert_same_files(checkpoint(run, 1), checkpoint(run, step))), 3)
            training = json.loads((checkpoint(run, step) / "manifest.json").read_text())["training"]
            self.assertEqual((training["skipped"], training["updates"], training["position"]), (step - 1, 1.0, 8 * step))

    def test_stop_at_once(self):
        path, run = self.run_file("run", self.EXTRA, nan_policy='"stop"')
        self.assertIn("last at step 2; the newest checkpoint is of step 1", self.upcycle("train", path, expect=1))


class Sources(TrainCase):
    def test_a_mixture_trains_on_as_it_is(self):
        """From its checkpoint and from its export; [moe] absent or agreeing. A contradiction is refused."""
        path, run = self.run_file("first", MOE)
        self.upcycle("train", path, ranks=2)
        out = self.root / "exported"
        self.upcycle("export", run, out, "--dtype", "fp32")
        self.assertEqual(json.loads((out / "config.json").read_text())["model_type"], "qwen3_moe")
        for name, source in (("checkpoint", run), ("export", out)):
            for extra in ("", MOE):
                path, next_run = self.run_file(f"{name}-{len(extra)}", extra, steps=1, source=f'model = "{source}"')
                said = self.upcycle("train", path)
                self.assertIn(f"reading {source}", said)
                self.assert_same_files(checkpoint(run, 6), checkpoint(next_run, 0), names=["weights.h5"])
                self.assertFalse((checkpoint(next_run, 0) / "certificate.json").exists())
                self.assertEqual(len(steps_of(next_run)), 1)
                self.assertLess(steps_of(next_run)[0]["loss"], 6.0)
        path, _ = self.run_file("other", MOE.replace("top_k = 4", "top_k = 8"), source=f'model = "{run}"')
        self.refused("train", path, words=["the source is a mixture of 8 experts, top-4, but [moe] asks for experts = 8, top_k = 8"])

    def test_a_dense_source_without_experts(self):
        path, run = self.run_file("run")
        self.upcycle("train", path, ranks=2)
        self.assertNotIn("tokens_per_expert", steps_of(run)[0])
        out = self.root / "out"
        self.upcycle("export", checkpoint(run, 0), out)
        stored, source = load_file(out / "model.safetensors"), dense_tensors()
        self.assertEqual(stored.keys(), source.keys())
        for name, value in source.items():
            self.assertTrue(np.array_equal(stored[name], value), name)

    def test_a_random_start(self):
        path, run = self.run_file("run", MOE, source=f'architecture = "{self.source / "config.json"}"')
        self.assertIn("random initialisation", self.upcycle("train", path, ranks=2))
        first = steps_of(run)[0]
        self.assertEqual(np.array(first["tokens_per_expert"]).shape, (2, 8))
        self.assertEqual(np.sum(first["tokens_per_expert"], 1).tolist(), [8 * SEQUENCE * 4] * 2)
        self.assertLess(abs(first["loss"] - np.log(VOCAB)), 0.2)

    def test_out_to_transformers(self):
        """The exported directory of a trained mixture has the validation loss that we print."""
        random = np.random.default_rng(2)
        write_tokens(self.root / "train", [random.integers(0, VOCAB // 2, 500)])
        held_out = random.integers(0, VOCAB // 2, 8 * SEQUENCE + 1)
        write_tokens(self.root / "held_out", [held_out])
        extra = MOE + '[optimizer]\nlr = 3e-3\nschedule = "constant"\n[validate]\nevery = 20\nbatches = 1\n'
        path, run = self.run_file("run", extra, steps=20, data='train = [[1.0, "train"]]\nvalidation = [[1.0, "held_out"]]')
        self.upcycle("train", path, ranks=2)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        before, ours = [line["loss"] for line in lines if line["kind"] == "validation"]
        self.assertLess(ours, before - 0.1, "it should have learnt that half of the vocabulary is not in use")
        self.upcycle("export", run, self.root / "out", "--dtype", "fp32")

        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
        logging.disable_progress_bar()
        model, report = AutoModelForCausalLM.from_pretrained(self.root / "out", dtype=torch.float32, output_loading_info=True)
        self.assertFalse(any(report.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report)
        tokens = torch.tensor(np.stack([held_out[i:i + SEQUENCE + 1] for i in range(0, 8 * SEQUENCE, SEQUENCE)]))
        with torch.no_grad():
            logits = model(tokens[:, :-1]).logits
        theirs = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), tokens[:, 1:].reshape(-1)).item()
        self.assertLess(abs(theirs - ours) / ours, 1e-5)


if __name__ == "__main__":
    tiny_run.UPCYCLE = os.path.abspath(sys.argv.pop(1))
    unittest.main()
