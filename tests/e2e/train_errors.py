#!/usr/bin/env python3
"""What upcycle train refuses: exit code 2, one clear message, nothing written, nothing lost. And a disk that fills during training.
Usage: train_errors.py UPCYCLE [unittest arguments]"""
import json
import os
import resource
import shutil
import signal
import struct
import sys
import time
import unittest

import numpy as np
import tiny_run
from safetensors.numpy import save_file
from tiny_run import CONFIG, MOE, VOCAB, TrainCase, checkpoint, dense_tensors, make_dense, steps_of, write_tokens


def with_version(step, version):
    path = step / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": version}))


class Layouts(TrainCase):
    def test_what_does_not_divide(self):
        path, _ = self.run_file("run", MOE + "[parallel]\nexpert = 3\n")
        self.refused("train", path, ranks=3, words=["expert = 3", "8"])
        path, _ = self.run_file("run", MOE + "[parallel]\nexpert = 4\n")
        self.refused("train", path, ranks=2, words=["expert", "4", "2"])
        path, _ = self.run_file("run", global_batch=9)
        self.refused("train", path, ranks=2, words=["the run does not divide on 2 ranks", "train.global_batch = 9"])

    def test_too_little_space(self):
        """A model of petabytes: the free space is asked for before anything is allocated."""
        config = self.root / "huge.json"
        config.write_text(json.dumps(CONFIG | {"hidden_size": 2**20, "num_hidden_layers": 200, "intermediate_size": 2**20}))
        path, _ = self.run_file("run", "[moe]\nmax_parameters = 1e18\n", source=f'architecture = "{config}"')
        self.refused("train", path, ranks=2, words=["step 0 and one checkpoint needs", "GB free", "run.directory"])


class Transport(TrainCase):
    def test_nccl_without_a_gpu(self):
        path, run = self.run_file("run")
        self.refused("train", path, "--set", "run.transport=nccl", ranks=2, words=['run.transport = "nccl"', "device is the CPU"])
        self.assertFalse(run.exists())


class RunDirectories(TrainCase):
    def trained(self, extra="", **settings):
        path, run = self.run_file("run", extra, **settings)
        self.upcycle("train", path)
        return path, run

    def test_another_run(self):
        path, run = self.trained()
        self.refused("train", path, "--set", "optimizer.lr=0.5", "run.seed=7", "train.steps=9", ranks=2,
                     words=["step-00000006", "optimizer.lr: 0.0001 there, 0.5 here", "run.seed: 1234 there, 7 here", "--accept-changes"])

    def test_foreign_files(self):
        path, run = self.run_file("run")
        run.mkdir()
        (run / "thesis.tex").write_text("\\end")
        self.refused("train", path, ranks=2, words=["holds thesis.tex and no run.toml"])
        run.rename(self.root / "away")
        run.write_text("")
        self.refused("train", path, words=["is not a directory"])

    def test_two_jobs(self):
        path, run = self.run_file("run", MOE, steps=100000)
        job = self.start("train", path, run=run, ranks=2, after=3)
        said = self.upcycle("train", path, expect=2)
        self.assertIn("another job runs in this directory: process", said)
        before = len(steps_of(run))
        job.send_signal(signal.SIGUSR2)
        self.finish(job, 75)
        done = [line["step"] for line in steps_of(run)]
        self.assertEqual(done, list(range(1, len(done) + 1)))
        self.assertGreaterEqual(len(done), before)
        self.assertIn("good", self.upcycle("verify", run))
        self.upcycle("train", path, "--set", f"train.steps={len(done) + 1}", "--accept-changes")   # the lock is free again

    def test_checkpoints_of_another_schema(self):
        path, run = self.trained()
        with_version(checkpoint(run, 6), 99)   # older ones are fine, but this one is another program's work, not damage
        self.refused("train", path, "--set", "train.steps=9", ranks=2, words=["step-00000006", "schema version 99", "newer"])
        shutil.rmtree(checkpoint(run, 0))
        self.refused("train", path, words=["step-00000006", "schema version 99"])
        other, _ = self.run_file("other", source=f'model = "{run}"')
        self.refused("train", other, words=["schema version 99"])

    def test_damaged_checkpoints(self):
        path, run = self.trained()
        weights = checkpoint(run, 6) / "weights.h5"
        weights.write_bytes(weights.read_bytes()[:-9])
        kept = shutil.copytree(run, self.root / "kept")
        said = self.upcycle("train", path)   # an older one is valid: the run goes on from there, and the damaged one is set aside
        self.assertIn("weights.h5: has", said)
        self.assertIn("step-00000006.damaged-1", said)
        self.assertEqual([line["step"] for line in steps_of(run)], [1, 2, 3, 4, 5, 6] * 2)
        shutil.rmtree(run)
        kept.rename(run)
        (checkpoint(run, 0) / "manifest.json").unlink()
        self.refused("train", path, ranks=2, words=["has checkpoints, but none is valid", "step-00000006/weights.h5: has",
                                                    "step-00000000: not a checkpoint", "move", "away to start again"])

    def test_a_dense_checkpoint_where_experts_are_asked_for(self):
        path, run = self.run_file("run", MOE)
        self.upcycle("convert", path, "--set", "moe.experts=0")
        self.refused("train", path, ranks=2, words=["step-00000000: it is a dense model, but [moe] asks for 8 experts", "run.directory"])
        path, other = self.run_file("other", MOE, source=f'model = "{run}"')   # what the message advises
        self.upcycle("train", path)
        self.assertIn("tokens_per_expert", steps_of(other)[0])
        path, dense = self.run_file("dense")
        self.upcycle("convert", path)
        self.assertIn("resuming from", self.upcycle("train", path))
        self.assertNotIn("tokens_per_expert", steps_of(dense)[0])


class FullDisk(TrainCase):
    def fills(self, directory, limited):
        """Step 0 is stored, then these ranks may write no file as large as a checkpoint's. What is there stays, and serves again."""
        path, run = self.run_file(directory, steps=400, global_batch=16)
        job = self.start("train", path, run=run, ranks=2, after=5)
        stored = {file: file.read_bytes() for file in checkpoint(run, 0).rglob("*") if file.is_file()}
        for rank in limited:
            resource.prlimit(self.ranks_of(job)[rank], resource.RLIMIT_FSIZE, (600_000, 600_000))
        job.send_signal(signal.SIGUSR2)
        said = self.finish(job, 2)
        self.assertEqual(said.count("upcycle: "), 1, said)
        self.assertIn(".partial/weights.h5", said)
        self.assertEqual([entry.name for entry in (run / "checkpoints").iterdir()], ["step-00000000"])
        self.assertEqual({file: file.read_bytes() for file in checkpoint(run, 0).rglob("*") if file.is_file()}, stored)
        self.upcycle("train", path, "--set", "train.steps=2", ranks=2)
        self.assertTrue(checkpoint(run, 2).is_dir())

    def test_of_the_metrics(self):
        """Rank 0 alone writes them: it ends the others, at once."""
        path, run = self.run_file("run", steps=1000000)
        job = self.start("train", path, run=run, ranks=2, after=5)
        resource.prlimit(self.ranks_of(job)[0], resource.RLIMIT_FSIZE, (10_000, 10_000))
        began = time.monotonic()
        said = self.finish(job, 2)
        self.assertEqual(said.count("upcycle: "), 1, said)
        self.assertIn("metrics.jsonl: is the disk full?", said)
        self.assertLess(time.monotonic() - began, 25)
        self.assertIn("good", self.upcycle("verify", run))

    def test_on_all_ranks(self):
        self.fills("run", limited=(0, 1))

    def test_on_one_rank(self):
        self.fills("run", limited=(1,))


class Data(TrainCase):
    def refused_data(self, *words, ranks=1):
        path, _ = self.run_file("run", MOE, data=f'train = [[1.0, "{self.root / "text"}"]]')
        self.refused("train", path, words=words, ranks=ranks)

    def test_indices_and_tokens(self):
        documents = [np.arange(n) % VOCAB for n in (40, 25, 60)]
        prefix = self.root / "text"
        self.refused_data("text.idx", "no such file")
        write_tokens(prefix, documents, magic=b"MMIDIDY\0\0")
        self.refused_data("text.idx: does not begin with MMIDIDX", ranks=2)
        write_tokens(prefix, documents, version=7)
        self.refused_data("text.idx: version 7, but only version 1 is read")
        write_tokens(prefix, documents)
        index = bytearray((self.root / "text.idx").read_bytes())
        index[34 + 12 + 8:34 + 12 + 16] = struct.pack("<q", 10**12)   # where the second document begins
        (self.root / "text.idx").write_bytes(index)
        self.refused_data("text.idx: sequence 1 begins at byte 1000000000000")
        write_tokens(prefix, documents)
        (self.root / "text.bin").write_bytes((self.root / "text.bin").read_bytes()[:-4])
        self.refused_data("text.bin: 496 bytes, but", "says 500: it was cut off")
        documents[1] = documents[1].copy()
        documents[1][20] = VOCAB
        write_tokens(prefix, documents)
        self.refused_data(f"text.bin: document 1, position 20: token id {VOCAB}, but the model's ids are 0 to {VOCAB - 1}", ranks=2)


class DenseSources(TrainCase):
    def refused_source(self, *words, ranks=1):
        path, _ = self.run_file("run", MOE)
        self.refused("train", path, words=words, ranks=ranks)

    def header(self):
        """The header of the source's one file, and the data behind it."""
        raw = (self.source / "model.safetensors").read_bytes()
        size = struct.unpack("<Q", raw[:8])[0]
        return json.loads(raw[8:8 + size]), raw[8 + size:]

    def write(self, header, data):
        text = json.dumps(header).encode()
        (self.source / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)

    def test_shards(self):
        names = sorted(dense_tensors())
        tensors = dense_tensors()
        (self.source / "model.safetensors").unlink()
        shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
        for shard, inside in shards.items():
            save_file({name: tensors[name] for name in inside}, self.source / shard, {"format": "pt"})
        weight_map = {name: shard for shard, inside in shards.items() for name in inside}
        (self.source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        second = self.source / "model-00002-of-00002.safetensors"
        whole = second.read_bytes()
        second.write_bytes(whole[:-100])
        self.refused_source("model-00002-of-00002.safetensors", ranks=2)
        second.unlink()
        self.refused_source("model-00002-of-00002.safetensors")
        second.write_bytes(whole)
        path, run = self.run_file("run", MOE, steps=1)
        self.upcycle("train", path)

    def test_headers_that_lie(self):
        name = "model.norm.weight"
        header, data = self.header()
        begin, end = header[name]["data_offsets"]
        for what, offsets in (("overlap", [begin - 4, end - 4]), ("past the end", [len(data) + 10, len(data) + 10 + end - begin]),
                              ("negative", [-128, 0]), ("huge", [2**63, 2**63 + 128]), ("backwards", [end, begin])):
            with self.subTest(what):
                self.write(header | {name: header[name] | {"data_offsets": offsets}}, data)
                self.refused_source("model.safetensors")
        self.write(header | {name: header[name] | {"dtype": "F16"}}, data)
        self.refused_source("model.safetensors", name)
        (self.source / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
        self.refused_source("model.safetensors")

    def test_wrong_tensors_are_listed_at_once(self):
        tensors = dense_tensors()
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = np.zeros(4, np.float32)
        tensors["model.norm.weight"] = np.ones(31, np.float32)
        make_dense(self.source, tensors)
        self.refused_source("3 tensors", "missing: model.layers.1.mlp.up_proj.weight [48, 32]",
                            "surplus: model.layers.0.self_attn.q_proj.bias [4]", "wrong shape: model.norm.weight is [31], expected [32]", ranks=2)

    def test_other_models(self):
        make_dense(self.source, architectures=["LlamaForCausalLM"], model_type="llama")
        self.refused_source("config.json", "llama", ranks=2)
        make_dense(self.source)
        given = self.root / "given.json"
        given.write_text(json.dumps(CONFIG | {"rope_theta": 1e4}))
        path, _ = self.run_file("run", source=f'model = "{self.source}"\narchitecture = "{given}"')
        self.refused("train", path, words=["are different models", "rope_theta"])
        path, _ = self.run_file("run", source=f'model = "{self.root / "absent"}"')
        self.refused("train", path, words=["absent", "not a directory"])
        path, _ = self.run_file("run", MOE.replace("top_k = 4", "top_k = 3"))
        self.refused("train", path, words=["moe.top_k", "3 % 4"])


if __name__ == "__main__":
    tiny_run.UPCYCLE = os.path.abspath(sys.argv.pop(1))
    unittest.main()
