#!/usr/bin/env python3
"""Ranks that do not see what rank 0 sees are found at start-up and named: exit code 2, one message, nothing written.
Usage: agreement.py UPCYCLE [unittest arguments]"""
import os
import shutil
import socket
import subprocess
import sys
import unittest
from pathlib import Path

import numpy as np
import tiny_run
from rank_server import served
from tiny_run import MOE, MPIRUN, VOCAB, TrainCase, make_dense, write_mask, write_tokens


class Agreement(TrainCase):
    def disagree(self, *ranks, words):
        """One command line for each rank: [options of mpirun..., "--", arguments of upcycle...] or just the latter."""
        line = [*MPIRUN]
        for i, rank in enumerate(ranks):
            options, program = (rank[:rank.index("--")], rank[rank.index("--") + 1:]) if "--" in rank else ([], rank)
            program = program if str(program[0]).startswith("/") else [served(tiny_run.UPCYCLE), *program]
            line += [*([":"] if i else []), "-np", "1", *map(str, options), *map(str, program)]
        before = self.tree()
        result = subprocess.run(line, capture_output=True, text=True, timeout=60, cwd=self.root)
        said = result.stdout + result.stderr
        self.assertEqual(result.returncode, 2, said)
        for word in words:
            self.assertIn(word, said)
        self.assertEqual(said.count("upcycle: "), 1, said)
        self.assertEqual(self.tree(), before, "something was written")
        return said

    def test_other_run_files_and_settings(self):
        a, _ = self.run_file("run", MOE)
        b = self.root / "b.toml"
        b.write_text("# not the same file, but the same run\n" + a.read_text())
        self.upcycle("train", a)
        shutil.rmtree(self.root / "run")
        b.write_text(a.read_text().replace("steps = 6", "steps = 7"))
        host = socket.gethostname()
        self.disagree(*[["train", a]] * 3, ["train", b],
                      words=[f"rank 3: its host {host} sees the run otherwise than rank 0's host {host}", "train.steps: 6 on rank 0, 7 on rank 3"])
        b.write_text("[train")
        self.disagree(["train", a], ["train", b], words=["rank 1: ", "b.toml:1:", "not TOML"])
        self.disagree(["train", a], ["train", self.root / "absent.toml"], words=["rank 1: ", "absent.toml: cannot be opened"])
        self.disagree(["train", a], ["train", a, "--set", "run.seed=5"], ["train", a, "--set", "run.seed=6"],
                      words=["rank 1: ", "(and so do 1 other ranks)", "run.seed: 1234 on rank 0, 5 on rank 1"])
        self.disagree(["train", a], ["train", a, "--set", "parallel.expert=2"], words=["parallel.expert: 1 on rank 0, 2 on rank 1"])
        self.disagree(["convert", a], ["convert", a, "--set", "run.directory=elsewhere"], words=['"elsewhere" on rank 1'])

    def test_another_program(self):
        path, _ = self.run_file("run", MOE)
        other = self.root / "upcycle"
        shutil.copy(tiny_run.UPCYCLE, other)
        with open(other, "ab") as file:
            file.write(b"\0")
        size = other.stat().st_size
        self.disagree(["train", path], ["train", path], [other, "train", path],
                      words=["rank 2: ", "the program", f"executable: {size - 1} bytes, digest ", f"{size} bytes, digest "])
        self.disagree(["train", path], ["convert", path], words=["rank 1: ", "command: train on rank 0, convert on rank 1"])

    def test_other_files(self):
        """The same names, as on two hosts with file systems of their own."""
        for place, first in (("a", 1), ("b", 2)):
            (self.root / place).mkdir()
            write_tokens(self.root / place / "text", [np.array([first, *range(40)]) % VOCAB])
            make_dense(self.root / place / "model")
        path, _ = self.run_file("run", MOE, source='model = "model"', data='train = [[1.0, "text"]]')
        on = [["-wdir", self.root / place, "--", "train", path] for place in "ab"]
        self.disagree(*on, words=["rank 1: ", "data.train, text.bin: 164 bytes, digest ", " on rank 0, 164 bytes, digest "])
        shutil.copy(self.root / "a/text.bin", self.root / "b/text.bin")
        write_mask(self.root / "a/text", [np.ones(41)])
        self.disagree(*on, words=["data.train, text.mask.bin: 41 bytes, digest ", "can't be read on rank 1"])
        write_mask(self.root / "b/text", [np.ones(41)])
        tensors = tiny_run.dense_tensors()
        tensors["model.norm.weight"][7] += 1
        make_dense(self.root / "b/model", tensors)
        self.disagree(*on, words=["rank 1: ", "source.model, model/model.safetensors: "])
        (self.root / "b/model/model.safetensors").unlink()
        self.disagree(*on, words=["source.model, model/model.safetensors: ", "absent on rank 1"])

    def test_jobs_of_one_rank(self):
        path, _ = self.run_file("run", MOE)
        for name in ("PMI_SIZE", "SLURM_STEP_NUM_TASKS"):
            result = subprocess.run([tiny_run.UPCYCLE, "train", str(path)], capture_output=True, text=True, timeout=60, cwd=self.root,
                                    env=os.environ | {name: "4"})
            self.assertEqual(result.returncode, 2, result.stderr)
            self.assertIn(f"the launcher started 4 ranks ({name} = 4), but MPI sees 1", result.stderr)
            self.assertFalse(Path(self.root / "run").exists())


if __name__ == "__main__":
    tiny_run.UPCYCLE = os.path.abspath(sys.argv.pop(1))
    unittest.main()
