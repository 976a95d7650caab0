#!/usr/bin/env python3
"""What `upcycle export` writes is, to transformers, the function that we train: logits are compared, for transformers fills missing
tensors with random values without failing. Usage: exported.py UPCYCLE GOLDEN_LOGITS REFERENCES (of make_golden.py)"""
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.utils import logging

UPCYCLE = GOLDEN_LOGITS = REFERENCES = None
RUN = """
[run]
directory = "{run}"
device = "cpu"
[source]
model = "{source}"
{more}
[train]
steps = {steps}
sequence = 24
global_batch = 4
precision = "fp32"
[optimizer]
lr = 1e-3
schedule = "constant"
router_lr_scale = 1.0
[data]
train = [[1.0, "mock"]]
"""


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


class Exported(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.root = Path(scratch.name)
        self.ids = load_file(REFERENCES / "dense_gqa1_fp32/golden.safetensors")["ids"][0][:, :-1].contiguous()
        save_file({"ids": self.ids}, self.root / "ids.safetensors")

    def call(self, *command):
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=200)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)

    def ours(self, model, name):
        out = self.root / f"logits-{name}"
        self.call(GOLDEN_LOGITS, model, self.root / "ids.safetensors", out)
        return load_file(out / "model.safetensors")["logits"]

    def theirs(self, directory):
        model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager",
                                                             experts_implementation="eager", output_loading_info=True)
        self.assertFalse(any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report)
        with torch.no_grad():
            return type(model).__name__, model(input_ids=self.ids, use_cache=False).logits.flatten(0, 1)

    def train_and_export(self, case, more, steps):
        """The checkpoint of the last step and its export in fp32."""
        run = self.root / f"run-{case}-{steps}"
        file = self.root / f"{run.name}.toml"
        file.write_text(RUN.format(run=run, source=REFERENCES / case / "model", more=more, steps=steps))
        self.call(UPCYCLE, "train", file)
        checkpoint = run / f"checkpoints/step-{steps:08}"
        export = self.root / f"export-{case}-{steps}"
        self.call(UPCYCLE, "export", checkpoint, export, "--dtype", "fp32")
        return checkpoint, export

    def hold(self, case, kind, more=""):
        checkpoint, export = self.train_and_export(case, more, steps=3)
        name, theirs = self.theirs(export)
        self.assertEqual(name, kind)
        self.assertLessEqual(distance(self.ours(checkpoint, "checkpoint"), theirs), 1e-5)
        self.assertLessEqual(distance(self.ours(export, "export"), theirs), 1e-5)
        moved = distance(theirs, self.theirs(REFERENCES / case / "model")[1])
        self.assertGreater(moved, 1e-2, "three steps changed nothing: nothing was proved")

    def test_dense(self):
        self.hold("dense_gqa2_tied_bf16_sharded", "Qwen3ForCausalLM")

    def test_upcycled_copies(self):
        self.hold("dense_gqa1_fp32", "Qwen3MoeForCausalLM", "[moe]\nexperts = 8\ntop_k = 2")

    def test_upcycled_shards(self):
        self.hold("dense_gqa8_fp16", "Qwen3MoeForCausalLM", "[moe]\nexperts = 16\ntop_k = 4\ngranularity = 4\nlayers = \"every:2\"")

    def test_a_mixture_that_trains_on(self):
        self.hold("moe_mixed_sparse_step_fp16", "Qwen3MoeForCausalLM")

    def test_an_exact_upcycle_is_the_dense_model_to_transformers(self):
        for case, more in (("dense_gqa2_tied_fp32", "[moe]\nexperts = 8\ntop_k = 2"),
                           ("dense_gqa8_fp16", "[moe]\nexperts = 64\ntop_k = 8\ngranularity = 8")):
            with self.subTest(case):
                self.train_and_export(case, more, steps=1)
                step0 = self.root / f"run-{case}-1/checkpoints/step-00000000"
                export = self.root / f"step0-{case}"
                self.call(UPCYCLE, "export", step0, export, "--dtype", "fp32")
                dense, moe = self.theirs(REFERENCES / case / "model"), self.theirs(export)
                self.assertEqual((dense[0], moe[0]), ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM"))
                self.assertLessEqual(distance(moe[1], dense[1]), 1e-5)


if __name__ == "__main__":
    UPCYCLE, GOLDEN_LOGITS, REFERENCES = (Path(argument).resolve() for argument in sys.argv[1:4])
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    unittest.main(argv=[sys.argv[0], *sys.argv[4:]])
