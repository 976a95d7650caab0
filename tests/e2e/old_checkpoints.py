#!/usr/bin/env python3
"""Checkpoints of earlier schema versions stay loadable: inspected, verified, exported with every value, and trained on. tests/fixtures has one
of each, written by the program of its time. Usage: old_checkpoints.py UPCYCLE [unittest arguments]"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import h5py
import torch
from rank_server import served
from safetensors.torch import load_file

UPCYCLE = None
FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


class OldCheckpoints(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.root = Path(scratch.name)

    def upcycle(self, *arguments):
        result = subprocess.run([served(UPCYCLE), *map(str, arguments)], capture_output=True, text=True, timeout=120, cwd=self.root)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        return result.stdout + result.stderr

    def test_version_1(self):
        self.serves(1)

    def test_version_2(self):
        step = self.serves(2)
        (step / "config.json").write_text((step / "config.json").read_text().replace("qwen3_moe", "qwen3-moe"))
        self.assertIn("good", self.upcycle("verify", step), "digests of texts are younger")

    def unpack(self, version):
        shutil.unpack_archive(FIXTURES / f"checkpoint-v{version}.tar.xz", self.root / "run/checkpoints")
        return self.root / "run/checkpoints/step-00000003"

    def serves(self, version):
        step = self.unpack(version)
        self.assertIn(f"schema version {version}", self.upcycle("inspect", step))
        self.assertIn("good", self.upcycle("verify", step))

        self.upcycle("export", step, "exported")
        exported = load_file(self.root / "exported/model.safetensors")
        with h5py.File(step / "weights.h5") as file, h5py.File(step / "masters.h5") as masters:
            names = []
            file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) and name != ".checksums" else None)
            seen = 0
            for name in names:
                stored, dotted = torch.from_numpy((masters if name in masters else file)[name].astype("float32")[...]), name.replace("/", ".")
                of_experts = dotted.partition(".experts.")
                parts = {dotted: stored} if not of_experts[1] else {f"{of_experts[0]}.experts.{e}.{of_experts[2]}": stored[e] for e in range(len(stored))}
                for part, value in parts.items():
                    self.assertTrue(torch.equal(exported[part].float(), value.to(exported[part].dtype).float()), part)
                    seen += 1
        self.assertEqual(seen, len(exported))

        manifest = json.loads((step / "manifest.json").read_text())
        self.assertEqual(manifest["schema_version"], version)
        (self.root / "run.toml").write_text(
            f'[run]\nname = "old"\ndirectory = "run"\ndevice = "cpu"\n[source]\nmodel = "dense"\n[moe]\nexperts = 4\ntop_k = 2\n'
            '[data]\ntrain = "mock"\n[train]\nsteps = 5\nsequence = 16\nglobal_batch = 4\nprecision = "bf16"\n')
        (self.root / "run/run.toml").write_text("")   # what says that this is a run's directory
        said = self.upcycle("train", "run.toml", "--accept-changes")   # two steps more: another schedule
        self.assertIn("resuming from run/checkpoints/step-00000003", said)
        newest = self.root / "run/checkpoints/step-00000005"
        self.assertEqual(json.loads((newest / "manifest.json").read_text())["schema_version"], 3)
        self.assertEqual(json.loads((newest / "manifest.json").read_text())["run_id"], manifest["run_id"])
        self.assertIn("good", self.upcycle("verify", newest))
        self.assertEqual(manifest["files"].keys(), json.loads((newest / "manifest.json").read_text())["files"].keys(), "texts travel on")
        return step


if __name__ == "__main__":
    UPCYCLE = os.path.abspath(sys.argv.pop(1))
    unittest.main()
