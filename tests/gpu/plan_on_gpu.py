#!/usr/bin/env python3
"""What a run takes of a GPU's memory against what was planned, in each mode of recomputation: layers of Qwen3-0.6B's widths with 8 experts, from
random weights, on one GPU. And ranks that share a GPU unasked. Exits 77 without a GPU.
Usage: plan_on_gpu.py UPCYCLE [unittest arguments]"""
import json
import os
import shutil
import subprocess
import sys
import unittest
from pathlib import Path

from gpu_here import skip_without_gpu

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests/e2e"))
import tiny_run                                # noqa: E402
from tiny_run import MOE, TrainCase, steps_of  # noqa: E402

ON_GPU = ["run.device=cuda"]
LAYERS, SEQUENCES, LENGTH = 3, 16, 2048   # without recomputation almost half of what is planned are activations
BOUND = 0.1


class Memory(TrainCase):
    def test_of_each_recompute_mode(self):
        config = json.loads((ROOT / "configs/models/qwen3-0.6b.json").read_text()) | {"num_hidden_layers": LAYERS, "max_window_layers": LAYERS}
        architecture = self.root / "cut.json"
        architecture.write_text(json.dumps(config))
        planned = {}
        for mode in ("none", "selective", "full"):
            with self.subTest(mode):
                path, run = self.run_file(mode, "[moe]\nexperts = 8\ntop_k = 2\n", steps=4, precision="bf16",
                                          source=f'architecture = "{architecture}"', sequence=LENGTH, global_batch=2 * SEQUENCES,
                                          micro_batch=SEQUENCES, recompute=f'"{mode}"')
                done = subprocess.run(self.command("train", path, "--set", *ON_GPU), capture_output=True, text=True, timeout=280, cwd=self.root)
                self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
                self.assertEqual([line["skipped"] for line in steps_of(run)], [False] * 4)
                lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
                memory = [line for line in lines if line["kind"] == "memory"][-1]
                peak, planned[mode] = memory["peak_bytes"], memory["planned_bytes"]
                print(f"recompute {mode}: {peak / 2**30:.2f} GiB, planned {planned[mode] / 2**30:.2f} GiB, {100 * (peak / planned[mode] - 1):+.1f} %", flush=True)
                self.assertLessEqual(abs(peak / planned[mode] - 1), BOUND)
            shutil.rmtree(run)   # its checkpoints take 6 GB
        # Or the bound would tell the modes from one another in no way.
        self.assertLess(planned["full"] * (1 + BOUND), planned["none"] * (1 - BOUND), planned)


class SharedGpu(TrainCase):
    def test_is_refused_unasked(self):
        path, run = self.run_file("run", MOE)
        self.refused("train", path, "--set", *ON_GPU, ranks=2, words=["there are more ranks than GPUs", "share one GPU", "run.share_gpu = true"])
        self.assertFalse(run.exists())


if __name__ == "__main__":
    tiny_run.UPCYCLE = os.path.abspath(sys.argv.pop(1))
    skip_without_gpu()
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]   # one, of however many
    unittest.main()
