#!/usr/bin/env python3
"""convert and export as streams: the bytes of `train` with no steps, whatever the recipe and the number of ranks; killed in the middle,
the same command goes on and ends with the same bytes. Usage: streaming.py UPCYCLE [unittest arguments]"""
import json
import os
import re
import signal
import subprocess
import sys
import time
import unittest
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

import tiny_run
from tiny_run import MOE, TrainCase, checkpoint, dense_tensors, make_dense

NO_VALIDATION = "[validate]\nevery = 0\n"
RECIPES = {   # name: further source, dtype of the source, lines of the run file
    "copies": ("", "bfloat16", "[moe]\nexperts = 4\ntop_k = 2\n"),
    "shards": ("", "float32", MOE),
    "shards-fp32": ("", "float32", MOE),
    "random": ("", "bfloat16", MOE + '[upcycle]\npermutation = "random"\n'),
    "clusters": ("", "float32", MOE + '[upcycle]\npermutation = "clusters"\n'),
    "cube-root": ("", "bfloat16", MOE + '[upcycle]\nscaling = "cube-root"\n'),
    "random-fp32": ("", "float16", MOE + '[upcycle]\npermutation = "random"\n'),
    "noise": ("", "bfloat16", MOE + "[upcycle]\nnoise = 0.05\ndrop = 0.3\n"),
    "layers": ("", "float16", MOE + 'layers = "first-dense:1"\n'),
    "two": ("two", "bfloat16", "[moe]\nexperts = 4\ntop_k = 2\n"),
}


class Streams(TrainCase):
    def make(self, directory, dtype, scale=1.0):
        """A source in `dtype`; safetensors' numpy has no bf16, so torch writes it."""
        make_dense(directory, torch_dtype=dtype)
        tensors = {name: torch.from_numpy(value * np.float32(scale)).to(getattr(torch, dtype)) for name, value in dense_tensors().items()}
        save_torch(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory

    def test_convert_grows_what_train_would_store(self):
        """Every tensor file, byte for byte: any recipe, both precisions, any number of ranks; by convert, and by train's own short way."""
        for name, (further, dtype, lines) in RECIPES.items():
            with self.subTest(name):
                source = f'model = "{self.make(self.root / "dense", dtype)}"'
                if further:
                    source = f'models = ["{self.root / "dense"}", "{self.make(self.root / "other", "bfloat16", 1.25)}"]'
                settings = dict(source=source, steps=0, precision="fp32" if name.endswith("fp32") else "bf16")
                # Its certificate needs a model, so this run has one in memory.
                path, whole = self.run_file(name, lines + NO_VALIDATION, **settings)
                self.assertIn("certificate", self.upcycle("train", path))
                path, run = self.run_file(f"{name}-converted", lines, **settings)
                self.upcycle("convert", path, ranks=3)
                self.assert_same_files(checkpoint(run, 0), checkpoint(whole, 0))
                self.held_against(checkpoint(run, 0), checkpoint(whole, 0))
                lines += "certify = false\n" if "[upcycle]" in lines else "[upcycle]\ncertify = false\n"
                path, run = self.run_file(f"{name}-train", lines + NO_VALIDATION, **settings)
                self.assertIn("without a model", self.upcycle("train", path))
                self.assert_same_files(checkpoint(run, 0), checkpoint(whole, 0))

    def held_against(self, converted, stored):
        """The manifests, but for who wrote it when; and the rest of the files."""
        a, b = (json.loads((at / "manifest.json").read_text()) for at in (converted, stored))
        for key in ("architecture", "training", "tensors"):
            self.assertEqual(a[key], b[key], key)
        self.assertEqual(a["provenance"].pop("command"), "convert")
        self.assertEqual(a["provenance"].pop("certificate"), "weights")
        self.assertEqual(b["provenance"].pop("certificate"), "passed")
        self.assertEqual(a["provenance"], b["provenance"])
        self.assertEqual(a["files"].keys(), b["files"].keys() - {"certificate.json"})

    def test_train_goes_on_from_it(self):
        """A run whose step 0 convert wrote trains like one that wrote its own."""
        path, own = self.run_file("own", MOE, steps=3)
        self.upcycle("train", path)
        path, run = self.run_file("run", MOE, steps=3)
        self.upcycle("convert", path, ranks=2)
        said = self.upcycle("train", path)
        self.assertIn("resuming", said)
        self.assert_same_files(checkpoint(run, 3), checkpoint(own, 3))
        self.assertEqual(self.upcycle("verify", run).count("bad"), 0)

    def test_moments_come_along(self):
        path, dense = self.run_file("dense", steps=2)
        self.upcycle("train", path)
        carry = MOE + '[upcycle]\noptimizer = "scaled"\n'
        path, own = self.run_file("own", carry, source=f'model = "{dense}"', steps=0)
        self.upcycle("train", path)
        path, run = self.run_file("run", carry, source=f'model = "{dense}"', steps=0)
        self.upcycle("convert", path, ranks=2)
        self.assertEqual(len(self.assert_same_files(checkpoint(run, 0), checkpoint(own, 0))), 3)
        self.held_against(checkpoint(run, 0), checkpoint(own, 0))

    def large(self):
        """About 100 MB as a mixture."""
        self.source = self.root / "large"
        self.source.mkdir()
        sizes = dict(vocab_size=2048, hidden_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                     intermediate_size=1024)
        random = np.random.default_rng(1)
        shapes = {"model.embed_tokens.weight": (2048, 256), "model.norm.weight": (256,)}
        for layer in range(4):
            at = f"model.layers.{layer}."
            shapes |= {at + "input_layernorm.weight": (256,), at + "post_attention_layernorm.weight": (256,),
                       at + "self_attn.q_proj.weight": (128, 256), at + "self_attn.k_proj.weight": (64, 256),
                       at + "self_attn.v_proj.weight": (64, 256), at + "self_attn.o_proj.weight": (256, 128),
                       at + "self_attn.q_norm.weight": (32,), at + "self_attn.k_norm.weight": (32,),
                       at + "mlp.gate_proj.weight": (1024, 256), at + "mlp.up_proj.weight": (1024, 256), at + "mlp.down_proj.weight": (256, 1024)}
        tensors = {name: random.standard_normal(shape, np.float32) * np.float32(0.02) for name, shape in shapes.items()}
        save_file(tensors, self.source / "model.safetensors", {"format": "pt"})
        (self.source / "config.json").write_text(json.dumps(tiny_run.CONFIG | sizes))

    def killed(self, command, ranks, after, partial):
        """Runs until its ranks have written `after` bytes; then all of it is killed at once. What it has left stays."""
        job = subprocess.Popen(self.command(*command, ranks=ranks), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.root)
        try:
            deadline = time.monotonic() + 60
            while True:
                self.assertTrue(job.poll() is None and time.monotonic() < deadline, "over before it was killed")
                pids = self.ranks_of(job) if ranks > 1 else [job.pid]
                if partial.exists() and sum(map(self.written, pids)) > after:
                    break
                time.sleep(0.0005)
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
        finally:
            if ranks == 1:
                job.kill()
            job.communicate(timeout=60)
        self.assertTrue(partial.exists(), "nothing is left")

    @staticmethod
    def written(pid):
        try:
            return int(re.search(r"wchar: (\d+)", Path(f"/proc/{pid}/io").read_text())[1])
        except (OSError, TypeError):
            return 0

    def continued(self, said, total):
        """N of 'N of M bytes were there'; M is `total`."""
        found = re.search(r"continuing.*: (\d+) of (\d+) bytes were there", said)
        self.assertTrue(found, said)
        self.assertEqual(int(found[2]), total)
        self.assertTrue(0 < int(found[1]) < total, said)
        return int(found[1])

    def test_convert_goes_on_after_a_kill(self):
        self.large()
        lines = "[moe]\nexperts = 16\ntop_k = 2\n"
        path, whole = self.run_file("whole", lines, precision="bf16", steps=0)
        self.upcycle("convert", path)
        total = json.loads((checkpoint(whole, 0) / "manifest.json").read_text())["tensors"]["weights.h5"]["bytes"]
        for first, second in ((1, 2), (2, 1), (2, 2)):
            with self.subTest(first=first, second=second):
                path, run = self.run_file(f"run-{first}-{second}", lines, precision="bf16", steps=0)
                step = checkpoint(run, 0)
                self.killed(("convert", path), first, 30_000_000, step.with_name(step.name + ".partial"))
                self.assertFalse(step.exists())
                there = self.continued(self.upcycle("convert", path, ranks=second), total)
                self.assertGreater(there, 10_000_000)
                self.assert_same_files(step, checkpoint(whole, 0))
                a, b = (json.loads((at / "manifest.json").read_text()) for at in (step, checkpoint(whole, 0)))
                self.assertEqual([a[key] for key in a if key not in ("run", "run_id", "layout", "digest")],
                                 [b[key] for key in b if key not in ("run", "run_id", "layout", "digest")])
                self.assertFalse(step.with_name(step.name + ".partial").exists())

    def test_export_goes_on_after_a_kill(self):
        self.large()
        path, run = self.run_file("run", "[moe]\nexperts = 16\ntop_k = 2\n", precision="bf16", steps=0)
        self.upcycle("convert", path)
        whole, out, partial = self.root / "whole", self.root / "out", self.root / "out.partial"
        options = ("--max-shard-size", "40MB", "--dtype", "fp32")
        self.upcycle("export", run, whole, *options)
        total = json.loads((whole / "model.safetensors.index.json").read_text())["metadata"]["total_size"]
        self.upcycle("export", run, self.root / "by-3", *options, ranks=3)
        self.same_directory(self.root / "by-3", whole)
        for first, second in ((1, 2), (2, 1), (2, 2)):
            with self.subTest(first=first, second=second):
                self.killed(("export", run, out, *options), first, 60_000_000, partial)
                self.assertFalse(out.exists())
                there = self.continued(self.upcycle("export", run, out, *options, ranks=second), total)
                self.assertGreater(there, 30_000_000)
                self.same_directory(out, whole)
                self.assertFalse(partial.exists())
                subprocess.run(["rm", "-r", out], check=True)
        self.killed(("export", run, out, *options), 2, 60_000_000, partial)
        self.assertNotIn("continuing", self.upcycle("export", run, out, "--max-shard-size", "40MB", "--dtype", "bf16"))   # another export
        self.assertFalse([name for name in os.listdir(out) if name.startswith(".")])

    def same_directory(self, a, b):
        self.assertEqual(sorted(os.listdir(a)), sorted(os.listdir(b)))
        for name in os.listdir(a):
            self.assertEqual((a / name).read_bytes(), (b / name).read_bytes(), name)


if __name__ == "__main__":
    tiny_run.UPCYCLE = os.path.abspath(sys.argv.pop(1))
    unittest.main()
