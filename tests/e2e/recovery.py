#!/usr/bin/env python3
"""What upcycle train does when something changed or went wrong since a checkpoint: other run files, lost and damaged checkpoints, steps that
are bad, replicas that differ, and which checkpoints it keeps. Usage: recovery.py UPCYCLE [unittest arguments]"""
import json
import os
import shutil
import sys
import unittest

import h5py
import numpy as np
import tiny_run
from check_schema import check
from tiny_run import MOE, SEQUENCE, VOCAB, TrainCase, checkpoint, make_dense, steps_of, write_tokens

CONSTANT = '[optimizer]\nschedule = "constant"\nlr = 1e-3\n'


def lines_of(run, kind):
    return [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["kind"] == kind]


def manifest_of(step):
    return json.loads((step / "manifest.json").read_text())


def steps_in(run):
    return sorted(int(entry.name[5:]) for entry in (run / "checkpoints").glob("step-????????"))


class Changes(TrainCase):
    def trained(self, extra=MOE + CONSTANT, **settings):
        path, run = self.run_file("run", extra, **({"steps": 3} | settings))
        self.upcycle("train", path)
        return path, run

    def test_what_is_computed(self):
        path, run = self.trained()
        changes = ["--set", "optimizer.lr=0.01", "train.global_batch=4", "train.sequence=8", "optimizer.warmup=2", "run.seed=7", "balance.aux=0.5", "train.steps=5"]
        listed = ["optimizer.lr: 0.001 there, 0.01 here", "train.global_batch: 8 there, 4 here", "train.sequence: 16 there, 8 here",
                  "optimizer.warmup: 0 there, 2 here", "run.seed: 1234 there, 7 here", "data.seed: 1234 there, 7 here", "balance.aux: 0.001 there, 0.5 here"]
        said = self.refused("train", path, *changes, ranks=2, words=["step-00000003", "--accept-changes", *listed])
        self.assertNotIn("train.steps:", said, "a constant schedule of another length is the same so far")
        said = self.upcycle("train", path, *changes, "--accept-changes", ranks=2)
        self.assertEqual(said.count("(--accept-changes):"), 1, said)
        for line in listed:
            self.assertIn(line, said)
        self.assertEqual([line["step"] for line in steps_of(run)], [1, 2, 3, 4, 5])
        stored = manifest_of(checkpoint(run, 5))
        self.assertEqual((stored["run"]["optimizer"]["lr"], stored["training"]["position"]), (0.01, 3 * 8 + 2 * 4))
        self.upcycle("train", path, *changes)   # these are its settings now
        self.refused("train", path, words=["optimizer.lr: 0.01 there, 0.001 here"])   # and those are not

    def test_what_is_free(self):
        path, run = self.trained()
        self.upcycle("train", path, "--set", "train.steps=4", "parallel.expert=2", "parallel.zero=0", "train.micro_batch=2", "train.recompute=full", "run.name=other",
                     "log.every=1", "checkpoint.every=2", "checkpoint.keep=1", "validate.every=2", "validate.batches=1", "moe.dispatcher=all-gather", "train.nan_limit=3",
                     "train.check_replicas=1", "run.timeout=1min", ranks=2)
        self.assertEqual([line["step"] for line in steps_of(run)], [1, 2, 3, 4])

    def test_other_lengths(self):
        path, run = self.trained(MOE)   # cosine
        words = ["train.steps: 3 there, 6 here", "already that of step 1 would have been another"]
        self.refused("train", path, "--set", "train.steps=6", words=words)
        self.upcycle("train", path, "--set", "train.steps=6", "--accept-changes")
        self.assertEqual(len(steps_of(run)), 6)
        path, run = self.run_file("wsd", '[optimizer]\nschedule = "wsd"\ndecay = 2\n', steps=6)
        self.upcycle("train", path, "--set", "checkpoint.every=4", "checkpoint.keep=9")
        self.refused("train", path, "--set", "train.steps=9", words=["train.steps: 6 there, 9 here"])
        shutil.rmtree(checkpoint(run, 6))
        self.upcycle("train", path, "--set", "train.steps=9")   # before the descent

    def test_another_model(self):
        path, run = self.trained(MOE + '[upcycle]\nnoise = 0.05\n' + CONSTANT)
        self.refused("train", path, "--set", "moe.experts=16", "moe.top_k=8", "upcycle.noise=0", "upcycle.scaling=none", "optimizer.lr=0.5", "--accept-changes", ranks=2,
                     words=["holds another model", "moe.experts: 8 there, 16 here", "moe.top_k: 4 there, 8 here", "upcycle.noise: 0.05 there, 0.0 here",
                            'upcycle.scaling: "exact" there, "none" here', "num_experts: 16 here, 8 there", "recipe, copies: 2 there, 4 here",
                            "These keys differ, too:\n  optimizer.lr: 0.001 there, 0.5 here", "source.model ="])
        config = json.loads((self.source / "config.json").read_text())
        (self.source / "config.json").write_text(json.dumps(config | {"vocab_size": 128, "rope_theta": 5e5}))
        self.refused("train", path, words=["vocab_size: 128 here, 96 there", "rope_theta: 500000.0 here, 1000000.0 there"])
        (self.source / "config.json").write_text(json.dumps(config))
        without = self.root / "without.toml"
        without.write_text(path.read_text().replace(MOE, ""))
        self.refused("train", without, words=["model_type: \"qwen3\" here, \"qwen3_moe\" there"])
        shutil.move(self.source, self.root / "moved")   # gone: nothing of it is needed
        self.upcycle("train", path, "--set", "train.steps=4")
        self.refused("train", path, "--set", "upcycle.noise=0.5", words=["upcycle.noise: 0.05 there, 0.5 here"])
        moved = self.root / "moved.toml"
        moved.write_text(path.read_text().replace(str(self.source), str(self.root / "moved")))
        self.upcycle("train", moved, "--set", "train.steps=5")   # the same files in another place
        make_dense(self.source)
        self.refused("train", path, words=[f'source.model: "{self.root / "moved"}" there, "{self.source}" here'])   # two of one shape

    def test_a_checkpoint_of_another_run(self):
        path, run = self.trained()
        other, elsewhere = self.run_file("other", MOE.replace("= 8", "= 4") + CONSTANT, steps=9)
        self.upcycle("train", other)
        shutil.copytree(checkpoint(elsewhere, 9), checkpoint(run, 9))
        self.refused("train", path, ranks=2, words=["step-00000009 holds another model", "num_experts: 8 here, 4 there"])

    def test_tokenizers(self):
        tokenizer = make_dense(self.root / "tokenizer")
        path, run = self.run_file("run", CONSTANT, steps=2, source=f'model = "{self.source}"\ntokenizer = "{tokenizer}"')
        self.upcycle("train", path)
        (tokenizer / "tokenizer.json").write_text('{"version": "2.0"}')
        (tokenizer / "merges.txt").write_text("a b\n")
        self.refused("train", path, "--set", "train.steps=3", words=["source.tokenizer, tokenizer.json: another file there", "source.tokenizer, merges.txt: absent there"])
        self.upcycle("train", path, "--set", "train.steps=3", "--accept-changes")
        self.assertEqual((checkpoint(run, 3) / "tokenizer/tokenizer.json").read_text(), '{"version": "2.0"}')
        self.assertEqual((checkpoint(run, 2) / "tokenizer/tokenizer.json").read_text(), '{"version": "1.0"}')

    def test_lost_checkpoints(self):
        path, run = self.trained()
        checkpoints = run / "checkpoints"
        checkpoints.rename(self.root / "away")
        self.refused("train", path, ranks=2, words=["checkpoints are gone", str(checkpoints)])
        checkpoints.symlink_to(self.root / "nowhere")
        self.refused("train", path, words=[f"{checkpoints}: No such file or directory"])
        checkpoints.unlink()
        checkpoints.write_text("")
        self.refused("train", path, words=[f"{checkpoints}: Not a directory"])
        checkpoints.unlink()
        other, _ = self.run_file("other", source=f'model = "{run}"')
        self.refused("train", other, words=["the directory of a run that has no checkpoint"])
        other, _ = self.run_file("other", source=f'model = "{checkpoint(run, 500)}"')
        self.refused("train", other, words=["step-00000500: not a directory"])
        (self.root / "away").rename(checkpoints)
        self.upcycle("train", path)


class BadSteps(TrainCase):
    EXPLODES = '[optimizer]\nlr = 1e30\nschedule = "constant"\n[checkpoint]\nevery = 1\nkeep = 1\n'

    def test_weights_that_make_every_step_bad(self):
        """The first update ruins them. Checkpoints from then on hold ruin: the one before is kept, and taken."""
        path, run = self.run_file("run", MOE + self.EXPLODES + "[log]\ntensorboard = true\n", steps=9, nan_limit=3, rollbacks=2)
        said = self.upcycle("train", path, "--set", "checkpoint.keep=2", ranks=2, expect=1)
        self.assertIn("the gradient was not finite for 3 steps in a row, last at step 4: back to the checkpoint of step 0, and on at sample 32, behind their data", said)
        self.assertIn("back to the checkpoint of step 0, and on at sample 64,", said)
        self.assertIn("; the run rolled back 2 times before (train.rollbacks)", said)
        self.assertEqual([line["step"] for line in steps_of(run)], [1, 2, 3, 4] * 3)
        self.assertEqual([line["tokens"] for line in steps_of(run)], [8 * SEQUENCE * n for n in range(1, 13)], "no batch was met twice")
        self.assertEqual([(line["step"], line["from"], line["bad_steps"], line["tokens"]) for line in lines_of(run, "rollback")],
                         [(0, 4, 3, 32 * SEQUENCE), (0, 4, 3, 64 * SEQUENCE)])
        first = [line["loss"] for line in steps_of(run) if line["step"] == 1]
        self.assertLess(max(first) - min(first), 0.5, "the weights of step 0, on other batches")
        self.assertEqual(len(set(first)), 3)
        self.assertIn(0, steps_in(run), "kept while steps are bad")

    def test_nothing_to_go_back_to(self):
        path, run = self.run_file("run", self.EXPLODES, steps=9, nan_limit=3)
        job = self.upcycle("train", path, "--set", "checkpoint.every=100", "train.rollbacks=1", expect=1)   # step 0, then out of roll-backs
        self.assertIn("the newest checkpoint is of step 0; the run rolled back 1 time before", job)
        path, run = self.run_file("stop", self.EXPLODES, steps=9, nan_policy='"stop"')
        self.assertIn("for 1 steps in a row, last at step 2; the newest checkpoint is of step 1", self.upcycle("train", path, expect=1))
        self.assertEqual(lines_of(run, "rollback"), [])


class Spikes(TrainCase):
    """A text that is soon known by heart, with documents of noise in it: their samples come up once each in an epoch."""
    STEPS = 220
    DATA = 'train = [[1.0, "text"]]\nsplit = [1, 0, 0]'
    EXTRA = (MOE + '[parallel]\nexpert = 2\n[optimizer]\nschedule = "constant"\nlr = 1e-2\n'
             '[balance]\nscope = "global"\nbias_rate = 0.001\n[checkpoint]\nevery = 20\nkeep = 2\n')

    def setUp(self):
        super().setUp()
        random = np.random.default_rng(5)
        verse = np.tile(np.arange(8) * 11, 150 * SEQUENCE // 8)
        write_tokens(self.root / "text", [verse, random.integers(0, VOCAB, 2 * SEQUENCE)] * 4)

    def run_of(self, name, **settings):
        return self.run_file(name, self.EXTRA, steps=self.STEPS, global_batch=2, data=self.DATA, **settings)

    def test_skipped_and_counted_alike_however_often_the_run_was_stopped(self):
        path, straight = self.run_of("straight", spike=6.0)
        said = self.upcycle("train", path, ranks=2)
        spikes = [line["step"] for line in steps_of(straight) if line.get("spike")]
        losses = {line["step"]: line["loss"] for line in steps_of(straight)}
        self.assertGreaterEqual(len(spikes), 2)
        self.assertTrue(all(losses[step] > 0.5 for step in spikes), losses)
        self.assertTrue(all(step in spikes for step, loss in losses.items() if step > 64 and loss > 2), losses)
        self.assertTrue(all(line["skipped"] == (line["step"] in spikes) for line in steps_of(straight)))
        self.assertIn(f"step {spikes[0]}: the loss, ", said)
        training = manifest_of(checkpoint(straight, self.STEPS))["training"]
        self.assertEqual(check(checkpoint(straight, self.STEPS)), [], "what is kept of the losses is as the schema says")
        self.assertEqual((training["skipped"], training["updates"], len(training["losses"])), (len(spikes), self.STEPS - len(spikes), 128))
        # Stopped shortly before a spike, the run still knows what its losses were.
        path, stopped = self.run_of("stopped", spike=6.0)
        for steps in (spikes[0] - 1, spikes[-1], self.STEPS):
            self.upcycle("train", path, "--set", f"train.steps={steps}", ranks=2)
        self.assert_same_files(checkpoint(straight, self.STEPS), checkpoint(stopped, self.STEPS))
        self.assertEqual(manifest_of(checkpoint(stopped, self.STEPS))["training"], training)
        # Nobody looks for them unless asked: the same batches, and learned from.
        path, plain = self.run_of("plain")
        self.upcycle("train", path, ranks=2)
        self.assertEqual([line["loss"] for line in steps_of(plain)][:spikes[0]], [line["loss"] for line in steps_of(straight)][:spikes[0]])
        self.assertNotEqual([line["loss"] for line in steps_of(plain)][spikes[0]], [line["loss"] for line in steps_of(straight)][spikes[0]])
        self.assertNotIn("losses", manifest_of(checkpoint(plain, self.STEPS))["training"])

    def test_rolled_back_and_on_behind_the_data(self):
        path, run = self.run_of("run", spike=6.0, nan_limit=1, rollbacks=20)
        said = self.upcycle("train", path, "--set", "checkpoint.asynchronous=true", ranks=2)   # a save may be on its way
        self.assertIn("checkpoints will be written behind the steps, from a copy of about", said)
        back = lines_of(run, "rollback")
        self.assertGreaterEqual(len(back), 1)
        self.assertIn(f"the loss was a spike (train.spike) for 1 steps in a row, last at step {back[0]['from']}: back to the checkpoint of step {back[0]['step']}", said)
        self.assertIn(f"done: run, {self.STEPS} steps", said)
        told = [line for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if line["kind"] in ("step", "rollback")]
        for before, line, after in zip(told, told[1:], told[2:]):
            if line["kind"] == "rollback":
                self.assertTrue(before["spike"])
                self.assertEqual((line["from"], line["tokens"]), (before["step"], before["tokens"]), "on behind the data of the bad step")
                self.assertTrue(line["step"] % 20 == 0 and line["step"] < before["step"] - 1, line)
                self.assertEqual((after["step"], after["tokens"]), (line["step"] + 1, line["tokens"] + 2 * SEQUENCE))
                self.assertLess(after["loss"], 1.0, "the weights of the checkpoint are good")
        training = manifest_of(checkpoint(run, self.STEPS))["training"]
        self.assertEqual((training["skipped"], training["updates"]), (0, self.STEPS), "counted as the checkpoints have it")
        taken_back = sum(line["from"] - line["step"] for line in back)
        self.assertEqual(training["position"], 2 * (self.STEPS + taken_back))
        self.assertEqual(steps_in(run), [200, 220])


class Replicas(TrainCase):
    def test_no_false_alarm(self):
        """On every kind of holders; what is looked at stays what it is."""
        layouts = {"tensor": "tensor = 2\nexpert = 2\n", "pipeline": "pipeline = 2\nexpert = 2\n", "whole": "expert = 2\nzero = 0\n", "context": "context = 2\n"}
        for name, layout in layouts.items():
            files = []
            for every in (0, 2):
                path, run = self.run_file(f"{name}-{every}", MOE + CONSTANT + f"[parallel]\n{layout}", steps=4, precision="bf16", check_replicas=every)
                self.upcycle("train", path, ranks=4)
                files.append(checkpoint(run, 4))
            self.assert_same_files(*files)


class KeepBest(TrainCase):
    EXTRA = CONSTANT.replace("1e-3", "3e-3") + "[validate]\nevery = 2\nbatches = 1\n[checkpoint]\nevery = 2\nkeep = 1\nkeep_best = true\n"

    def test_the_best_stays(self):
        """Validation is on other text than training: soon it gets worse."""
        random = np.random.default_rng(6)
        write_tokens(self.root / "train", [random.integers(0, VOCAB // 2, 3000)])
        write_tokens(self.root / "held_out", [random.integers(VOCAB // 2, VOCAB, 8 * SEQUENCE + 1)])
        path, run = self.run_file("run", self.EXTRA, steps=16, data='train = [[1.0, "train"]]\nvalidation = [[1.0, "held_out"]]')
        for steps in (10, 16):   # found again by the second start
            self.upcycle("train", path, "--set", f"train.steps={steps}", ranks=2)
        losses = {line["step"]: line["loss"] for line in lines_of(run, "validation") if line["step"] > 0}
        best = min(losses, key=losses.get)
        self.assertLess(best, 10, losses)
        self.assertEqual(steps_in(run), [best, 16])
        for step in (best, 16):
            self.assertEqual(manifest_of(checkpoint(run, step))["training"]["validation_loss"], losses[step])
        self.upcycle("train", path, "--set", "checkpoint.keep_best=false", "train.steps=18")
        self.assertEqual(steps_in(run), [18])

    def test_refused(self):
        path, _ = self.run_file("run", self.EXTRA)
        self.refused("train", path, "--set", "validate.every=0", words=["checkpoint.keep_best = true needs validate.every > 0"])
        self.refused("train", path, "--set", "checkpoint.every=3", ranks=2, words=["checkpoint.every = 3 is not a multiple of validate.every = 2"])
        path, _ = self.run_file("keys", spike=-1.0, rollbacks=-1, check_replicas='"often"')
        self.refused("train", path, words=["train.spike: -1.0 is less than 0", "train.rollbacks: -1 is less than 0", "train.check_replicas: an integer is expected"])


class Damage(TrainCase):
    """One bit that flipped on the disk: the checksums of blocks, verified while a checkpoint is loaded, tell."""

    def trained(self):
        path, run = self.run_file("run", MOE + CONSTANT + "[checkpoint]\nevery = 2\nkeep = 9\n", steps=6)
        self.upcycle("train", path, ranks=2)
        return path, run

    def flip(self, step, file, name):
        """One bit in the values of a tensor."""
        with h5py.File(step / file) as opened:
            offset = opened[name].id.get_offset() + 5
        with open(step / file, "r+b") as opened:
            opened.seek(offset)
            byte = opened.read(1)[0]
            opened.seek(offset)
            opened.write(bytes([byte ^ 0x10]))

    def test_falls_back(self):
        path, run = self.trained()
        kept = shutil.copytree(run, self.root / "kept")
        name = "model/layers/1/mlp/experts/down_proj/weight"
        for file in ("weights.h5", "exp_avg_sq.h5"):
            with self.subTest(file):
                self.flip(checkpoint(run, 6), file, name)
                said = self.upcycle("train", path, ranks=2)
                for word in (file, name.replace("/", "."), "step-00000006.damaged-1", "the newest valid one before it, step-00000004", "resuming from"):
                    self.assertIn(word, said)
                self.assertEqual([line["step"] for line in steps_of(run)], [1, 2, 3, 4, 5, 6, 5, 6])
                self.assert_same_files(checkpoint(kept, 6), checkpoint(run, 6))   # computed again
                shutil.rmtree(run)
                shutil.copytree(kept, run)

    def test_two_and_then_all(self):
        path, run = self.trained()
        for step in (6, 4):
            self.flip(checkpoint(run, step), "weights.h5", "model/embed_tokens/weight")
        said = self.upcycle("train", path)
        self.assertIn("step-00000006.damaged-1", said)
        self.assertIn("step-00000004.damaged-1", said)
        self.assertEqual([line["step"] for line in steps_of(run)][-4:], [3, 4, 5, 6])

    def test_the_only_one(self):
        path, run = self.trained()
        for step in (0, 2, 4):
            shutil.rmtree(checkpoint(run, step))
        self.flip(checkpoint(run, 6), "weights.h5", "model/embed_tokens/weight")
        before = {file: content for file, content in self.tree().items() if file.parent.name != "heartbeat" and file.name != "lock"}
        said = self.upcycle("train", path, "--set", "log.every=3", ranks=2, expect=2)   # which run.toml would tell
        self.assertIn("model.embed_tokens.weight", said)
        self.assertEqual(said.count("upcycle: "), 1, said)
        after = {file: content for file, content in self.tree().items() if file.parent.name != "heartbeat" and file.name != "lock"}
        self.assertEqual(after, before)

    def test_a_text(self):
        """Of a damaged tokenizer file nothing is taken over; what goes on says so in run.toml."""
        path, run = self.trained()
        file = checkpoint(run, 6) / "tokenizer/tokenizer.json"
        file.write_text(file.read_text().replace("1", "7"))
        said = self.upcycle("train", path, "--set", "log.every=3", ranks=2)
        self.assertIn("tokenizer.json: is not what was written (its digest does not fit its content): the file was changed or damaged: going on behind it, from step-00000004", said)
        self.assertIn("step-00000006.damaged-1", said)
        self.assertEqual((checkpoint(run, 6) / "tokenizer/tokenizer.json").read_text(), '{"version": "1.0"}')
        self.assertRegex((run / "run.toml").read_text(), r"every = 3\b")


if __name__ == "__main__":
    tiny_run.UPCYCLE = os.path.abspath(sys.argv.pop(1))
    unittest.main()
