"""Adam's moments carried over into an upcycled model: they are the dense slices', on any layout; a mixture of one expert goes on
exactly as the dense model would have. Usage: moments.py UPCYCLE [unittest arguments]"""
import json
import os
import sys
import unittest

import h5py
import numpy as np
import tiny_run
from tiny_run import FFN, LAYERS, MOE, TrainCase, checkpoint, steps_of

CONSTANT = '[optimizer]\nschedule = "constant"\nlr = 3e-3\n'


def tensor(step, file, name):
    with h5py.File(step / file) as stored:
        return stored[name.replace(".", "/")][...]


class Moments(TrainCase):
    def setUp(self):
        super().setUp()
        path, self.dense = self.run_file("dense", CONSTANT, steps=5)
        self.upcycle("train", path)

    def continued(self, name, extra, steps=4, ranks=1, **settings):
        path, run = self.run_file(name, CONSTANT + extra, steps=steps, source=f'model = "{self.dense}"', **settings)
        self.upcycle("train", path, ranks=ranks)
        return run

    def losses(self, run):
        return np.array([line["loss"] for line in steps_of(run)]), np.array([line["grad_norm"] for line in steps_of(run)])

    def test_one_expert_goes_on_as_the_dense_model(self):
        one = "[moe]\nexperts = 1\ntop_k = 1\n"
        for how in ("copy", "scaled"):
            carry = f'[upcycle]\noptimizer = "{how}"\n'
            dense, mixture = self.continued(f"dense-{how}", carry), self.continued(f"one-{how}", one + carry)
            for a, b in zip(self.losses(dense), self.losses(mixture)):
                np.testing.assert_allclose(b, a, rtol=1e-6)
        fresh = self.continued("fresh", one)
        self.assertGreater(np.abs(self.losses(fresh)[0] - self.losses(dense)[0])[1:].min(), 1e-3, "moments that make no difference prove nothing")
        # The dense run's own next step is the first of its continuation: same moments, same count. (It sees other tokens; its weights
        # before that step are the same bytes.)
        self.assert_same_files(checkpoint(self.dense, 5), checkpoint(dense, 0))

    def test_they_are_the_dense_slices_on_any_layout(self):
        scaled = MOE + '[upcycle]\noptimizer = "scaled"\n'
        one = checkpoint(self.continued("one", scaled, steps=0), 0)
        for file, power in (("exp_avg.h5", 1), ("exp_avg_sq.h5", 2)):
            for layer in range(LAYERS):
                at = f"model.layers.{layer}.mlp."
                np.testing.assert_array_equal(tensor(one, file, at + "gate.weight"), 0)
                for matrix, factor, axis in (("gate_proj", 1, 0), ("up_proj", 2, 0), ("down_proj", 2, 1)):
                    dense = tensor(checkpoint(self.dense, 5), file, at + matrix + ".weight")
                    self.assertGreater(np.abs(dense).max(), 0)
                    shards = np.split(dense, 4, axis=axis)
                    expected = np.stack([shards[e % 4] for e in range(8)]) * np.float32(0.5 / factor ** power)   # K/N = 1/2
                    np.testing.assert_array_equal(tensor(one, file, at + f"experts.{matrix}.weight"), expected)
            name = "model.layers.1.self_attn.q_proj.weight"
            np.testing.assert_array_equal(tensor(one, file, name), tensor(checkpoint(self.dense, 5), file, name))
        for order in ("identity", "random"):
            ordered = scaled + f'permutation = "{order}"\n'
            runs = [self.continued(f"{order}-{ranks}-{zero}", ordered + f"[parallel]\nzero = {zero}\n{layout}", ranks=ranks)
                    for ranks, zero, layout in ((1, 0, ""), (2, 1, "tensor = 2\nexpert = 2\n"), (4, 1, "expert = 2\nexpert_tensor = 2\n"),
                                                (4, 1, "pipeline = 2\n"))]
            for run in runs:
                files = self.assert_same_files(checkpoint(runs[0], 0), checkpoint(run, 0))
                self.assertEqual(files, ["weights.h5", "exp_avg.h5", "exp_avg_sq.h5"])
                self.assertEqual(json.loads((checkpoint(run, 0) / "manifest.json").read_text())["training"]["updates"], 5)
                self.assertEqual(json.loads((checkpoint(run, 4) / "manifest.json").read_text())["training"]["updates"], 9)
                np.testing.assert_allclose(self.losses(run)[0], self.losses(runs[0])[0], rtol=1e-5)

    def test_a_run_that_stops_before_its_first_checkpoint(self):
        extra = CONSTANT + MOE + '[upcycle]\noptimizer = "copy"\n'
        straight = self.continued("straight", MOE + '[upcycle]\noptimizer = "copy"\n')
        path, run = self.run_file("stopped", extra, steps=4, source=f'model = "{self.dense}"')
        self.upcycle("train", path, "--set", "train.steps=0")
        self.assertEqual(steps_of(run), [])
        (self.dense / "checkpoints").rename(self.root / "gone")   # it is not asked again
        self.upcycle("train", path)
        self.assert_same_files(checkpoint(straight, 4), checkpoint(run, 4))
        self.upcycle("verify", checkpoint(run, 0))

    def test_moments_that_are_not_there(self):
        carry = '[upcycle]\noptimizer = "copy"\n'
        path, _ = self.run_file("hf", MOE + carry)
        self.refused("train", path, words=['upcycle.optimizer = "copy"', "Hugging Face directory", "no optimizer state"])
        self.refused("plan", path, words=["upcycle.optimizer", "no moments to carry over"])
        path, _ = self.run_file("zero", MOE + carry, source=f'model = "{checkpoint(self.dense, 0)}"')
        self.refused("train", path, words=["step-00000000 is a checkpoint without moments", "later step"], ranks=2)
        self.refused("plan", path, words=["upcycle.optimizer", "no moments to carry over"])
        path, _ = self.run_file("there", MOE + carry, source=f'model = "{self.dense}"')
        self.assertIn("moments copied", self.upcycle("plan", path))
        path, _ = self.run_file("random", MOE + carry, source=f'architecture = "{self.source / "config.json"}"')
        self.refused("train", path, words=["carries the moments", "source.model"])
        path, _ = self.run_file("word", MOE + '[upcycle]\noptimizer = "scale"\n')
        self.refused("plan", path, words=["upcycle.optimizer", '"scaled"'])


if __name__ == "__main__":
    tiny_run.UPCYCLE = os.path.abspath(sys.argv.pop(1))
    unittest.main()
