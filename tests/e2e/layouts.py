"""The executable on many ranks: tensor x pipeline x expert from the command line gives one rank's losses and checkpoints travel between
layouts; the layout of configs/qwen3-14b-64e.toml (TP1 PP4 EP8 on 32 ranks) at a small width gives one rank's losses."""
import json
import os
import shutil
import sys
import unittest

import h5py
import numpy as np
import tiny_run
from tiny_run import MOE, TrainCase, checkpoint, steps_of

NARROW_14B = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=256, hidden_size=128, num_hidden_layers=40,
                  num_attention_heads=8, num_key_value_heads=2, head_dim=16, intermediate_size=128, max_position_embeddings=4096,
                  rope_theta=1e6, rms_norm_eps=1e-6, hidden_act="silu", attention_bias=False, tie_word_embeddings=False,
                  torch_dtype="float32")


class Layouts(TrainCase):
    def losses(self, run):
        return [step["loss"] for step in steps_of(run)]

    def assert_close(self, a, b, relative):
        self.assertEqual(len(a), len(b))
        for one, other in zip(a, b):
            self.assertLess(abs(one - other), relative * abs(one), f"{a}\n{b}")

    def test_tensor_pipeline_expert_from_the_command_line(self):
        one, one_run = self.run_file("one", MOE, steps=8)
        self.upcycle("train", one)
        many, many_run = self.run_file("many", MOE, steps=8)
        axes = [f"--set=parallel.{axis}=2" for axis in ("tensor", "pipeline", "expert")]
        said = self.upcycle("train", many, *axes, "--log-level=debug", ranks=8)
        self.assertIn("tensor 2", said)
        self.assertIn("debug: rank 0's group of axis tensor (2 ranks): [0, 1]", said)
        self.assertRegex(said, r"debug: \d+ buckets of gradients, in backward's order:\n.*debug: +(?:lm_head|model)\.")
        self.assert_close(self.losses(one_run), self.losses(many_run), 1e-5)
        self.assertEqual((one_run / "checkpoints/step-00000000/weights.h5").read_bytes(),
                         (many_run / "checkpoints/step-00000000/weights.h5").read_bytes(), "grown on another layout, the same bytes")
        certificate = json.loads((checkpoint(many_run, 8) / "certificate.json").read_text())
        self.assertEqual(certificate["verdict"], "passed", certificate)

        # Stopped on eight ranks, gone on with on four of another layout, and on one: every tensor is that of the run on one rank.
        whole, whole_run = self.run_file("whole", MOE, steps=8)
        self.upcycle("train", whole, "--set=optimizer.schedule=constant")
        going, run = self.run_file("going", MOE, steps=8)
        self.upcycle("train", going, "--set=train.steps=4", "--set=optimizer.schedule=constant", *axes, ranks=8)
        shutil.copytree(run, self.root / "stopped")
        for ranks, other in ((4, ["--set=parallel.context=2", "--set=parallel.expert=4"]), (1, [])):
            shutil.rmtree(run)
            shutil.copytree(self.root / "stopped", run)
            self.upcycle("train", going, "--set=optimizer.schedule=constant", *other, ranks=ranks)
            self.assert_close(self.losses(whole_run), self.losses(run), 1e-5)
            for name in ("weights.h5", "exp_avg.h5", "exp_avg_sq.h5"):
                self.assert_close_files(checkpoint(whole_run, 8) / name, checkpoint(run, 8) / name)

    def assert_close_files(self, a, b, relative=1e-4):
        with h5py.File(a) as one, h5py.File(b) as other:
            names = []
            one.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) and "name" in item.attrs else None)
            self.assertGreater(len(names), 10)
            for name in names:
                x, y = one[name][...].astype(np.float64), other[name][...].astype(np.float64)
                self.assertLessEqual(np.linalg.norm(x - y), relative * np.linalg.norm(x) + 1e-12, f"{a.name}: {name}")

    def test_the_14b_layout_at_a_small_width(self):
        config = self.root / "narrow.json"
        config.write_text(json.dumps(NARROW_14B))
        moe = "[moe]\nexperts = 64\ntop_k = 8\ngranularity = 8\n[checkpoint]\nevery = 2\n"
        size = dict(steps=2, sequence=128, global_batch=32, source=f'architecture = "{config}"')
        one, one_run = self.run_file("one", moe, **size)
        self.upcycle("train", one)
        many, many_run = self.run_file("many", moe + "[parallel]\npipeline = 4\nexpert = 8\n", recompute='"full"', **size)
        self.upcycle("train", many, ranks=32)
        self.assert_close(self.losses(one_run), self.losses(many_run), 1e-5)
        self.assert_close([s["grad_norm"] for s in steps_of(one_run)], [s["grad_norm"] for s in steps_of(many_run)], 1e-5)


if __name__ == "__main__":
    tiny_run.UPCYCLE = os.path.abspath(sys.argv.pop(1))
    unittest.main()
