#!/usr/bin/env python3
"""upcycle inspect A B on checkpoints of one tiny run and on copies that were changed by hand: what differs, by how much (NumPy's numbers), and
the exit code; and what inspect says of one at a glance.
Usage: compare.py UPCYCLE [unittest arguments]"""
import json
import os
import re
import shutil
import sys
import tempfile
import unittest
from pathlib import Path

import h5py
import numpy as np
import xxhash

import tiny_run
from seal import seal
from tiny_run import MOE, TrainCase, checkpoint


def numbers(before, after):
    """What inspect must say of two arrays of one dtype and shape: bits decide what differs."""
    raw = {2: np.uint16, 4: np.uint32, 8: np.uint64}[before.dtype.itemsize]
    differ = before.view(raw) != after.view(raw)
    a, b = before.astype(np.float64), after.astype(np.float64)
    apart = np.abs(a - b)[differ]
    finite = apart[np.isfinite(apart)]
    reference = np.sum(a[np.isfinite(a)] ** 2)
    return {"elements": before.size, "differ": int(differ.sum()), "not_finite": int(apart.size - finite.size),
            "max_abs": float(finite.max(initial=0)), "relative_l2": float(np.sqrt(np.sum(finite ** 2) / reference)) if reference else None}


class Compare(TrainCase):
    trained = None   # a directory with the run that all tests look at

    def setUp(self):
        super().setUp()
        if Compare.trained is None:
            path, run = self.run_file("run", MOE + "[checkpoint]\nkeep = 9\nevery = 3\n", steps=6)
            self.upcycle("train", path)
            Compare.trained = tempfile.TemporaryDirectory()
            unittest.addModuleCleanup(Compare.trained.cleanup)
            shutil.copytree(run, f"{Compare.trained.name}/run")
            shutil.rmtree(run)
        self.run_directory = Path(shutil.copytree(f"{Compare.trained.name}/run", self.root / "run"))
        self.step = checkpoint(self.run_directory, 6)

    def copy(self, name="copy"):
        return Path(shutil.copytree(self.step, self.root / name / "step-00000006"))

    def compare(self, a, b, same=False):
        told = self.run_json(a, b, expect=0 if same else 1)
        self.assertEqual(told["same"], same)
        said = self.upcycle("inspect", a, b, expect=0 if same else 1)
        self.assertTrue(said.rstrip().endswith("the same" if same else "they differ"), said)
        return told, said

    def run_json(self, *arguments, expect=0):
        return json.loads(self.upcycle("inspect", *arguments, "--json", expect=expect))

    def tensors(self, step, file):
        out = {}
        with h5py.File(step / file) as opened:
            opened.visititems(lambda place, d: out.update({place.replace("/", "."): d[...]}) if isinstance(d, h5py.Dataset) else None)
        del out[".checksums"]
        return out

    def assert_numbers(self, told, expected):
        for key, value in expected.items():
            if isinstance(value, float):
                self.assertAlmostEqual(told[key], value, delta=1e-12 * abs(value), msg=key)
            else:
                self.assertEqual(told[key], value, key)

    def test_a_checkpoint_and_itself(self):
        count = len(self.tensors(self.step, "weights.h5"))
        for a, b in ((self.step, self.step), (self.run_directory, self.step), (self.copy(), self.run_directory)):
            told, said = self.compare(a, b, same=True)
            self.assertEqual(told["tensors"]["weights.h5"], {"equal": count, "only_in_first": [], "only_in_second": [], "changed": {}})
            self.assertEqual(list(told["tensors"]), ["exp_avg.h5", "exp_avg_sq.h5", "weights.h5"])
            self.assertIn(f"weights.h5: {count} tensors are equal", said)

    def test_two_steps(self):
        """Every number against NumPy's; --tensors lists each, without it layers share a line."""
        first = checkpoint(self.run_directory, 3)
        told, said = self.compare(first, self.run_directory)
        self.assertIn({"key": "step", "first": 3, "second": 6}, told["training"])
        self.assertIn({"key": "position", "first": 24, "second": 48}, told["training"])
        self.assertEqual((told["settings"], told["architecture"], told["provenance"]), ([], [], []))
        for file in ("weights.h5", "exp_avg.h5", "exp_avg_sq.h5"):
            before, after = self.tensors(first, file), self.tensors(self.step, file)
            changed = told["tensors"][file]["changed"]
            for name in before:
                expected = numbers(before[name], after[name])
                if expected["differ"]:
                    self.assert_numbers(changed[name], expected)
                else:
                    self.assertNotIn(name, changed)
            self.assertEqual(told["tensors"][file]["equal"], len(before) - len(changed))
            self.assertGreater(len(changed), 10)
        self.assertIn("step: 3 -> 6", said)
        self.assertIn("model.layers.*.self_attn.q_proj.weight               float32 [64, 32]  x 2", said)
        each = self.upcycle("inspect", first, self.step, "--tensors", expect=1)
        for layer in range(2):
            name = f"model.layers.{layer}.self_attn.q_proj.weight"
            d = told["tensors"]["weights.h5"]["changed"][name]
            self.assertRegex(each, rf"{name} +float32 \[64, 32\]\n      max {d['max_abs']:.4g}, relative L2 {d['relative_l2']:.4g}, {d['differ']} of 2048 differ")
        told, _ = self.compare(checkpoint(self.run_directory, 0), self.step)
        self.assertEqual(told["files_only_in_second"], ["exp_avg.h5", "exp_avg_sq.h5"])

    def test_changed_by_hand(self):
        """One element, a NaN, a sign of zero, a missing tensor, another shape, another dtype: nothing else is told."""
        other = self.copy()
        with h5py.File(other / "weights.h5", "r+") as file:
            names = {"q": "model/layers/1/self_attn/q_proj/weight", "norm": "model/norm/weight", "down": "model/layers/0/mlp/experts/down_proj/weight",
                     "gate": "model/layers/0/mlp/gate/weight", "k": "model/layers/0/self_attn/k_proj/weight", "v": "model/layers/0/self_attn/v_proj/weight"}
            file[names["q"]][3, 5] += 0.25
            file[names["norm"]][1] = np.nan
            down = file[names["down"]][...]
            down[2, 1, 1] = -np.inf
            down[7, -1, -1] *= 2
            file[names["down"]][...] = down
            file[names["gate"]][...] = file[names["gate"]][...] * 1.0   # written, not changed
            del file[names["k"]]
            value = file[names["v"]][...]
            del file[names["v"]]
            file.create_dataset(names["v"], data=value.reshape(-1, 16))
            half = file["model/layers/1/self_attn/v_proj/weight"][...]
            del file["model/layers/1/self_attn/v_proj/weight"]
            file.create_dataset("model/layers/1/self_attn/v_proj/weight", data=half.astype(np.int64))
            file.create_dataset("surplus", data=np.zeros(3, np.float32))
        seal(other)
        before, after = self.tensors(self.step, "weights.h5"), self.tensors(other, "weights.h5")
        told, said = self.compare(self.step, other)
        weights = told["tensors"]["weights.h5"]
        self.assertEqual(weights["only_in_first"], ["model.layers.0.self_attn.k_proj.weight"])
        self.assertEqual(weights["only_in_second"], ["surplus"])
        dotted = {key: name.replace("/", ".") for key, name in names.items()}
        changed = weights["changed"]
        self.assertEqual(sorted(changed), sorted([dotted["q"], dotted["norm"], dotted["down"], dotted["v"], "model.layers.1.self_attn.v_proj.weight"]))
        for key in ("q", "norm", "down"):
            self.assert_numbers(changed[dotted[key]], numbers(before[dotted[key]], after[dotted[key]]))
        self.assertEqual((changed[dotted["q"]]["differ"], changed[dotted["norm"]]["not_finite"], changed[dotted["down"]]["not_finite"]), (1, 1, 1))
        self.assertEqual(changed[dotted["v"]], {"first": {"dtype": "float32", "shape": [32, 32]}, "second": {"dtype": "float32", "shape": [64, 16]}})
        cast = changed["model.layers.1.self_attn.v_proj.weight"]
        self.assertEqual((cast["first"]["dtype"], cast["second"]["dtype"]), ("float32", "int64"))
        self.assertEqual(cast["max_abs"], float(np.abs(before["model.layers.1.self_attn.v_proj.weight"]).max()))   # all below 1: zeros
        for line in ("the shapes differ", "float32 [32, 32] -> float32 [64, 16]", "only in the first: model.layers.0.self_attn.k_proj.weight",
                     "only in the second: surplus", "1 of 32 differ (1 of them by no number)"):
            self.assertIn(line, said)
        self.assertEqual(weights["equal"], len(before) - 6)
        self.assertTrue(all(not entry["changed"] for file, entry in told["tensors"].items() if file != "weights.h5"))

    def test_signs_and_moments_of_zero(self):
        a, b = self.copy("a"), self.copy("b")
        for step, sign in ((a, 1.0), (b, -1.0)):
            with h5py.File(step / "exp_avg.h5", "r+") as file:
                file["model/norm/weight"][...] = np.zeros(32, np.float32) * np.float32(sign)
                file["model/layers/0/input_layernorm/weight"][...] = np.float32(0 if sign > 0 else 2)
            seal(step)
        told, said = self.compare(a, b)
        changed = told["tensors"]["exp_avg.h5"]["changed"]
        self.assert_numbers(changed["model.norm.weight"], {"differ": 32, "max_abs": 0.0, "relative_l2": 0.0})
        self.assert_numbers(changed["model.layers.0.input_layernorm.weight"], {"differ": 32, "max_abs": 2.0})
        self.assertIsNone(changed["model.layers.0.input_layernorm.weight"]["relative_l2"])
        self.assertIn("relative L2 inf", said)

    def test_settings_recipe_and_names(self):
        other = self.copy()

        def change(m):
            m["run_id"] = "another"
            m["run"]["run"]["directory"] = "elsewhere"
            m["layout"]["ranks"] = 64
        seal(other, change)
        told, said = self.compare(self.step, other, same=True)
        self.assertEqual([entry["key"] for entry in told["names"]], ["run_id", "run.directory"])
        self.assertEqual(told["layout"], [{"key": "ranks", "first": 1, "second": 64}])
        self.assertIn("ranks: 1 -> 64 (no difference)", said)

        def change_more(m):
            m["run"]["optimizer"]["lr"] = 0.5
            m["run"]["data"]["surprise"] = 1
            del m["run"]["train"]["nan_limit"]
            m["architecture"]["rope_theta"] = 5.0
            m["provenance"]["recipe"]["noise"] = 0.1
            m["training"]["routers"] = {"0": {"bias": [0.125] * 40}}
        seal(other, change_more)
        seal(self.step, lambda m: m["training"].update(routers={"0": {"bias": [0.125] * 39 + [1.0]}}))
        (other / "certificate.json").write_text('{"verdict": "failed", "expected": "exact"}')
        (other / "note.txt").write_text("new")
        (other / "tokenizer/tokenizer.json").write_text("{ }")
        seal(other)
        told, said = self.compare(self.step, other)
        self.assertEqual(told["settings"], [{"key": "data.surprise", "second": 1}, {"key": "optimizer.lr", "first": 1e-4, "second": 0.5},
                                            {"key": "train.nan_limit", "first": 10}])
        self.assertEqual(told["architecture"], [{"key": "rope_theta", "first": 1e6, "second": 5.0}])
        self.assertEqual([entry["key"] for entry in told["provenance"]], ["recipe.noise", "certificate.json"])
        self.assertEqual(told["other_files"], ["only the second has note.txt", "tokenizer/tokenizer.json differs"])
        for line in ("optimizer.lr: 0.0001 -> 0.5", "train.nan_limit: 10 -> absent", "recipe.noise: 0.0 -> 0.1", "rope_theta: 1000000.0 -> 5.0",
                     "routers.0.bias: 1 of 40 values differ", 'certificate.json: "passed (expected: exact)" -> "failed (expected: exact)"'):
            self.assertIn(line, said)

    def test_at_a_glance(self):
        said = self.upcycle("inspect", self.run_directory)
        for line in ("recipe        2 copies x 4 shards = 8 experts, 4 a token, exact, scaling exact (gate 1, up 2, down 2), router logits std 1.4, noise 0, drop 0",
                     "data          48 sequences taken of 16 tokens: 768", "training      6 updates of the weights, 0 steps skipped, with the optimizer's moments",
                     "written by    1 ranks", "certificate   passed (expected: exact)", "step          6 of run run-"):
            self.assertIn(line, said)
        self.assertIn("2 copies x 4 shards", self.run_json(self.step)["recipe"])
        each, told = self.upcycle("inspect", self.step, "--tensors"), self.run_json(self.step)
        self.assertIn(f"digest        {json.loads(self.upcycle('verify', self.step, '--json'))['digest']}", said)
        sums = set()
        for name, value in self.tensors(self.step, "exp_avg.h5").items():   # of one block each
            shape = f"[{', '.join(map(str, value.shape))}]"
            content = f"{name}\nFloat\n{shape}\n".encode() + xxhash.xxh3_64_intdigest(value.tobytes()).to_bytes(8, "little")
            sums.add(xxhash.xxh3_128_hexdigest(content))
            self.assertEqual(told["tensors"]["exp_avg.h5"][name]["checksum"], xxhash.xxh3_128_hexdigest(content))
            self.assertRegex(each, rf"  {re.escape(name)} +float32  {re.escape(shape)}  {xxhash.xxh3_128_hexdigest(content)}\n")
        self.assertGreater(len(sums), 20)
        path, dense = self.run_file("dense", steps=1)
        self.upcycle("train", path)
        self.assertIn("recipe        none: a dense model", self.upcycle("inspect", dense))
        told, _ = self.compare(dense, self.run_directory)
        self.assertIn({"key": "num_experts", "second": 8}, told["architecture"])
        self.assertIn("model.layers.0.mlp.gate_proj.weight", told["tensors"]["weights.h5"]["only_in_first"])

    def test_what_cannot_be_compared(self):
        self.refused("inspect", self.step, self.root / "absent", words=["absent: neither a valid checkpoint nor a run that has one"])
        self.refused("inspect", self.step, self.step, self.step, words=["is one argument too many"])
        other = self.copy()
        (other / "weights.h5").write_bytes((other / "weights.h5").read_bytes()[:-1])
        self.refused("inspect", self.step, other, words=["weights.h5: has", "but the manifest says"])
        other = self.copy("damaged")
        with h5py.File(other / "weights.h5") as file:
            offset = file["model/norm/weight"].id.get_offset()
        with open(other / "weights.h5", "r+b") as raw:
            raw.seek(offset)
            raw.write(b"\1\2\3")
        self.refused("inspect", self.step, other, words=["tensor 'model.norm.weight', elements 0 to 31", "are not what was written"])


if __name__ == "__main__":
    tiny_run.UPCYCLE = os.path.abspath(sys.argv.pop(1))
    unittest.main()
