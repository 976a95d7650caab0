#!/usr/bin/env python3
"""Checkpoints that are not what was written, or not this run's: verify and train each say what is wrong in one message, and write nothing.
Usage: damaged.py UPCYCLE [unittest arguments]"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import h5py
import numpy as np

import tiny_run
from check_schema import digest_of
from seal import seal
from tiny_run import MOE, TrainCase, checkpoint

# Root is refused nothing as long as it has these two capabilities.
LIKE_ANYBODY = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all", "--"] if os.geteuid() == 0 else []
NORM, Q0, Q1 = "model/norm/weight", "model/layers/0/self_attn/q_proj/weight", "model/layers/1/self_attn/q_proj/weight"


def extent(file, place):
    with h5py.File(file) as opened:
        dataset = opened[place]
        return dataset.id.get_offset(), dataset.id.get_storage_size()


def overwrite(file, offset, content):
    with open(file, "r+b") as raw:
        raw.seek(offset)
        raw.write(content)


def flip(file, offset):
    byte = file.read_bytes()[offset]
    overwrite(file, offset, bytes([byte ^ 4]))


def change_manifest(step, change):
    """A manifest that says of itself that it is whole."""
    path = step / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest | {"digest": digest_of(manifest)}))


def with_sizes(step):
    change_manifest(step, lambda m: m["files"].update({p.name: p.stat().st_size for p in step.glob("*.h5")}))


# What is done to a step directory.

def truncated(step):
    os.truncate(step / "weights.h5", (step / "weights.h5").stat().st_size - 1)


def truncated_and_told(step):
    os.truncate(step / "exp_avg.h5", (step / "exp_avg.h5").stat().st_size // 2)
    with_sizes(step)


def wrong_magic(step):
    overwrite(step / "weights.h5", 0, b"\x89XDF")


def foreign_file(step):
    (step / "weights.h5").unlink()
    with h5py.File(step / "weights.h5", "w") as file:
        file["temperature"] = np.arange(100.0)
    with_sizes(step)


def foreign_file_of_floats(step):
    (step / "weights.h5").unlink()
    with h5py.File(step / "weights.h5", "w") as file:
        file["temperature"] = np.arange(100, dtype=np.float32)
    with_sizes(step)


def missing_file(step):
    (step / "exp_avg_sq.h5").unlink()


def missing_dataset(step):
    with h5py.File(step / "weights.h5", "r+") as file:
        del file[NORM]
    with_sizes(step)


def missing_dataset_and_sealed(step):
    with h5py.File(step / "weights.h5", "r+") as file:
        del file[NORM]
    seal(step)


def swapped_bytes(step):
    file = step / "weights.h5"
    (a, size), (b, _) = extent(file, Q0), extent(file, Q1)
    whole = file.read_bytes()
    overwrite(file, a, whole[b:b + size])
    overwrite(file, b, whole[a:a + size])


def swapped_names(step):
    with h5py.File(step / "exp_avg.h5", "r+") as file:
        file.move(Q0, "away")
        file.move(Q1, Q0)
        file.move("away", Q1)
    with_sizes(step)


def wrong_shape(step):
    with h5py.File(step / "weights.h5", "r+") as file:
        value = file[Q1][...]
        del file[Q1]
        file[Q1] = value.T.copy()
    seal(step)


def wrong_dtype(step):
    with h5py.File(step / "exp_avg.h5", "r+") as file:
        value = file[Q1][...]
        del file[Q1]
        file[Q1] = value.astype(np.int64)
    seal(step)


def flipped_bit_in_data(step):
    flip(step / "exp_avg_sq.h5", extent(step / "exp_avg_sq.h5", Q1)[0] + 1000)


def flipped_bit_in_a_checksum(step):
    flip(step / "weights.h5", extent(step / "weights.h5", ".checksums")[0] + 17)


def flipped_bit_in_metadata(step):
    file = step / "weights.h5"
    flip(file, file.read_bytes().index(b"q_proj"))   # the name of a link


def flipped_bit_in_the_manifest(step):
    path = step / "manifest.json"
    flip(path, path.read_bytes().index(b'"run_id": "') + 15)


def flipped_bit_in_a_text(step):
    flip(step / "config.json", 40)


def flipped_bit_in_a_text_below(step):
    flip(step / "tokenizer/tokenizer.json", 3)


def another_step_number(step):
    change_manifest(step, lambda m: m.update(step=5))


def future_version(step):
    change_manifest(step, lambda m: m.update(schema_version=99))


def half_a_manifest(step):
    os.truncate(step / "manifest.json", 300)


def empty_manifest(step):
    os.truncate(step / "manifest.json", 0)


NOT_WRITTEN = "are not what was written"
# damage: verify's exit code, what verify says, what train says; train's exit code is 2 always
DAMAGES = {
    truncated: (1, "weights.h5: has ", "weights.h5: has "),
    truncated_and_told: (1, "exp_avg.h5: truncated file", "exp_avg.h5: truncated file"),
    wrong_magic: (1, "weights.h5: file signature not found", "weights.h5: file signature not found"),
    foreign_file: (1, "weights.h5: tensor 'temperature': its type is none of float32, bfloat16 and int64", "its type is none of"),
    foreign_file_of_floats: (1, "weights.h5: has no checksums", "weights.h5: has no checksums"),
    missing_file: (1, "exp_avg_sq.h5: No such file or directory", "exp_avg_sq.h5: No such file or directory"),
    missing_dataset: (1, "tensors are missing or have other shapes than when it was written", "tensors are missing or have other shapes"),
    missing_dataset_and_sealed: (1, "weights.h5: tensor 'model.norm.weight' is missing", "tensor 'model.norm.weight' is not there"),
    swapped_bytes: (1, NOT_WRITTEN, NOT_WRITTEN),
    swapped_names: (1, NOT_WRITTEN, NOT_WRITTEN),
    wrong_shape: (1, "'model.layers.1.self_attn.q_proj.weight' has shape [32, 64], its architecture says [64, 32]", "has shape [32, 64], but [64, 32] is wanted"),
    wrong_dtype: (1, "exp_avg.h5: tensor 'model.layers.1.self_attn.q_proj.weight' is Long, not Float", "holds Long, but Float is wanted"),
    flipped_bit_in_data: (1, "tensor 'model.layers.1.self_attn.q_proj.weight' (layer 1), elements 0 to 2047", NOT_WRITTEN),
    flipped_bit_in_a_checksum: (1, NOT_WRITTEN, NOT_WRITTEN),
    flipped_bit_in_metadata: (1, "weights.h5", "weights.h5"),
    flipped_bit_in_the_manifest: (2, "manifest.json: is not what was written", "manifest.json: is not what was written"),
    flipped_bit_in_a_text: (1, "step-00000006/config.json: is not what was written", "step-00000006/config.json: is not what was written"),
    flipped_bit_in_a_text_below: (1, "tokenizer/tokenizer.json: is not what was written", "tokenizer/tokenizer.json: is not what was written"),
    another_step_number: (1, "step-00000006: its manifest is of step 5", None),
    future_version: (2, "schema version 99, but this program reads versions 1 to 3 only", "schema version 99"),
    half_a_manifest: (2, "manifest.json: not valid JSON", "manifest.json: not valid JSON"),
    empty_manifest: (2, "manifest.json: not valid JSON", "manifest.json: not valid JSON"),
}


class Damaged(TrainCase):
    trained = None   # a directory with the runs that all tests look at
    root = None      # where they were trained

    def setUp(self):
        super().setUp()
        self.path, self.run_directory = self.run_file("run", MOE, steps=6)
        if Damaged.trained is None:
            Damaged.trained, Damaged.root = tempfile.TemporaryDirectory(), str(self.root)
            unittest.addModuleCleanup(Damaged.trained.cleanup)
            self.upcycle("train", self.path)
            shutil.rmtree(checkpoint(self.run_directory, 0))   # nothing to fall back to
            shutil.move(self.run_directory, f"{Damaged.trained.name}/run")
            other, directory = self.run_file("other", steps=7, precision="bf16")
            self.upcycle("train", other)
            shutil.move(directory, f"{Damaged.trained.name}/other")
        self.step = checkpoint(self.run_directory, 6)

    def fresh(self):
        shutil.rmtree(self.run_directory, ignore_errors=True)
        trained = Path(Damaged.trained.name)
        shutil.copytree(trained / "run", self.run_directory)
        run_file = self.run_directory / "run.toml"   # names directories of the test that trained it
        run_file.write_text(run_file.read_text().replace(Damaged.root, str(self.root)))

    def unchanged(self, command, expect, closed=None, mode=0, ranks=1):
        """What the command says, once, and that it leaves everything as it was. heartbeat/ is of whoever was there last, no part of a run's
        state: a job that has the directory says so in there before it reads the values of its checkpoint. `closed`: a file or directory that
        has `mode` meanwhile."""
        before = self.tree()
        if closed:
            usual = closed.stat().st_mode
            closed.chmod(mode)
        try:
            said = self.upcycle(*command, expect=expect, ranks=ranks, through=LIKE_ANYBODY if closed else [])
        finally:
            if closed:
                closed.chmod(usual)
        after = self.tree()
        self.assertEqual(sorted(after), sorted(before), "something was written or lost")
        claims = {self.run_directory / "heartbeat/rank_00000"} if command[0] == "train" else set()
        self.assertEqual([path for path in before if after[path] != before[path] and path not in claims], [], "something was changed")
        return said

    def test_each_damage(self):
        for damage, (code, verify_says, train_says) in DAMAGES.items():
            with self.subTest(damage.__name__):
                self.fresh()
                damage(self.step)
                said = self.unchanged(["verify", self.step], code)
                self.assertIn(verify_says, said)
                if code == 1:
                    self.assertIn("BAD", said)
                if train_says is None:
                    continue
                said = self.unchanged(["train", self.path, "--set", "train.steps=8", "--accept-changes"], 2)
                self.assertIn(train_says, said)
                self.assertEqual(said.count("upcycle: "), 1, said)
        self.fresh()   # and what is not damaged goes on
        self.unchanged(["verify", self.step], 0)
        self.upcycle("train", self.path, "--set", "train.steps=8", "--accept-changes")

    def test_several_ranks_see_the_same(self):
        self.fresh()
        alone = json.loads(self.unchanged(["verify", self.step, "--json"], 0))
        for ranks in (2, 3):
            together = json.loads(self.upcycle("verify", self.step, "--json", ranks=ranks))
            self.assertEqual(together | {"seconds": 0}, alone | {"seconds": 0})
        for damage in (flipped_bit_in_data, swapped_bytes, wrong_shape, truncated):
            with self.subTest(damage.__name__):
                self.fresh()
                damage(self.step)
                said = [line for line in self.upcycle("verify", self.step, ranks=3, expect=1).splitlines() if "step-00000006" in line or "tensor" in line]
                alone = self.upcycle("verify", self.step, expect=1).splitlines()
                self.assertEqual([line for line in said if "GB in" not in line], [line for line in alone if "GB in" not in line])

    def refused_entry(self, command, closed, mode, says, expect=2, ranks=1):
        with self.subTest(command=command[0], closed=closed.name, ranks=ranks):
            said = self.unchanged(command, expect, closed, mode, ranks)
            self.assertIn(says, said)
            self.assertIn("Permission denied", said)
            self.assertEqual(said.count("Permission denied"), 1, said)
            if expect == 2:
                self.assertEqual(said.count("upcycle: "), 1, said)

    def test_without_permission(self):
        if LIKE_ANYBODY and not shutil.which("setpriv"):
            self.skipTest("root may read and write everything, and there is no setpriv (util-linux) to take that away")
        shut = self.root / "shut"
        shut.write_text("")
        shut.chmod(0)
        self.assertIn("Permission denied", subprocess.run([*LIKE_ANYBODY, "cat", shut], capture_output=True, text=True).stderr)
        self.fresh()
        resume = ["train", self.path, "--set", "train.steps=8", "--accept-changes"]
        weights, steps = self.step / "weights.h5", self.step.parent
        self.refused_entry(["verify", self.step], weights, 0, str(weights), expect=1)
        self.refused_entry(resume, weights, 0, str(weights))
        for command, ranks in ((["verify", self.step], 1), (["verify", self.run_directory], 2), (resume, 1), (resume, 2)):
            self.refused_entry(command, self.step, 0, f"{self.step}/manifest.json: Permission denied", ranks=ranks)
        # Where nothing may be written that is known before any step is done.
        for ranks in (1, 2):
            self.refused_entry(resume, steps, 0o500, f"writing into {steps}: Permission denied", ranks=ranks)
            self.refused_entry(resume, self.run_directory, 0o500, f"writing into {self.run_directory}: Permission denied", ranks=ranks)
        parent = self.root / "parent"
        parent.mkdir()
        for command in (["train", self.path], ["convert", self.path]):
            self.refused_entry([*command, "--set", f"run.directory={parent / 'below/run'}"], parent, 0o500, f"writing into {parent}: Permission denied")
        self.assertEqual(list(parent.iterdir()), [])
        self.upcycle(*resume)   # and with permission it goes on

    def test_a_checkpoint_of_another_run(self):
        self.fresh()
        shutil.copytree(checkpoint(Path(Damaged.trained.name) / "other", 7), checkpoint(self.run_directory, 7))
        self.assertIn("good", self.unchanged(["verify", self.run_directory], 0))
        said = self.unchanged(["train", self.path, "--set", "train.steps=8", "--accept-changes"], 2)
        self.assertIn("step-00000007", said)


if __name__ == "__main__":
    tiny_run.UPCYCLE = os.path.abspath(sys.argv.pop(1))
    unittest.main()
