#!/usr/bin/env python3
"""upcycle inspect of token files: counts, histogram, mask, text; and that it tells them from checkpoints.
Usage: inspect_data.py UPCYCLE [unittest arguments]"""
import json
import os
import shutil
import struct
import sys
import unittest
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import tiny_run
from tiny_run import TrainCase, write_tokens

MEGATRON = Path(__file__).resolve().parents[1] / "fixtures/megatron"
TEXTS = ["Ein größeres Übel", "", "日本 🦜", "x" * 300]


def make_tokenizer(directory):
    """One token a byte."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


class InspectData(TrainCase):
    def setUp(self):
        super().setUp()
        self.tokenizer = make_tokenizer(self.root / "bytes")
        self.documents = [np.array(self.tokenizer.encode(text).ids, np.int32) for text in TEXTS]
        self.prefix = self.root / "text"
        write_tokens(self.prefix, self.documents)

    def inspect(self, *arguments):
        return json.loads(self.upcycle("inspect", *arguments, "--json"))

    def write_mask(self, bits):
        lengths = np.array([len(row) for row in bits], np.int32)
        offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64)
        (self.root / "text.mask.bin").write_bytes(np.concatenate(bits).astype(np.uint8).tobytes())
        (self.root / "text.mask.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 1, len(bits), len(bits) + 1) + lengths.tobytes() +
                                                  offsets.tobytes() + np.arange(len(bits) + 1, dtype=np.int64).tobytes())

    def test_counts(self):
        found = self.inspect(self.prefix)
        every = np.concatenate(self.documents)
        self.assertEqual((found["documents"], found["empty_documents"], found["tokens"], found["dtype"]), (4, 1, len(every), "int32"))
        self.assertEqual(found["ids"], {"smallest": int(every.min()), "largest": int(every.max())})
        self.assertEqual(sum(bucket["documents"] for bucket in found["lengths"]), 4)
        for bucket in found["lengths"]:
            inside = [len(d) for d in self.documents if bucket["from"] <= len(d) <= bucket["to"]]
            self.assertEqual((bucket["documents"], bucket["tokens"]), (len(inside), sum(inside)))
        self.assertIsNone(found["learned"])
        self.assertEqual([d["ids"] for d in found["first_documents"]], [d[:64].tolist() for d in self.documents[:3]])
        self.assertIsNone(found["first_documents"][0]["text"])
        for ending in (".bin", ".idx"):
            self.assertEqual(self.inspect(f"{self.prefix}{ending}"), found)
        said = self.upcycle("inspect", self.prefix)
        self.assertRegex(said, r"(?m)^ids +\d+ to \d+$")
        self.assertRegex(said, r"(?m)^ +256-511 +1 +300  #+$")

    def test_files_that_megatron_wrote(self):
        """A sequence counts as a document, as in training."""
        for name, content in json.loads((MEGATRON / "contents.json").read_text())["files"].items():
            with self.subTest(name):
                found = self.inspect(MEGATRON / name)
                sequences = [sequence for document in content["documents"] for sequence in document]
                ids = sum(sequences, [])
                self.assertEqual((found["documents"], found["empty_documents"]), (len(sequences), sequences.count([])))
                self.assertEqual((found["tokens"], found["dtype"]), (len(ids), content["dtype"]))
                self.assertEqual(found["ids"], {"smallest": min(ids), "largest": max(ids)})
                self.assertEqual([document["ids"] for document in found["first_documents"]], sequences[:3])

    def test_text(self):
        found = self.inspect(self.prefix, "--tokenizer", self.root / "bytes")
        self.assertEqual([d["text"] for d in found["first_documents"]], TEXTS[:3])
        self.assertIn("Übel", self.upcycle("inspect", self.prefix, "--tokenizer", self.root / "bytes"))

    def test_mask(self):
        self.write_mask([np.arange(len(d)) % 4 == 0 for d in self.documents])
        share = sum((np.arange(len(d)) % 4 == 0).sum() for d in self.documents) / sum(len(d) for d in self.documents)
        self.assertAlmostEqual(self.inspect(self.prefix)["learned"], share)
        self.assertIn("% of the tokens, says", self.upcycle("inspect", self.prefix))
        self.write_mask([np.ones(len(d)) for d in self.documents[:-1]])
        self.refused("inspect", self.prefix, words=["text.mask.idx: 3 documents, but", "text.idx has 4"])

    def test_told_from_checkpoints(self):
        run_file, run = self.run_file("run", steps=1)
        self.upcycle("train", run_file)
        self.assertIn("checkpoint", self.inspect(run))
        for file in ("bin", "idx"):
            shutil.copy(f"{self.prefix}.{file}", f"{run}.{file}")
        self.refused("inspect", run, words=["is a directory, and", "run.idx for the token files", "run/ for the checkpoint"])
        self.assertEqual(self.inspect(f"{run}.idx")["documents"], 4)
        self.assertIn("checkpoint", self.inspect(f"{run}/"))
        self.refused("inspect", f"{run}/", "--tokenizer", self.root / "bytes", words=["--tokenizer is for token files"])
        self.refused("inspect", self.root / "absent", words=["absent: neither the directory of a checkpoint or a run, nor token files (no ", "absent.idx)"])

    def test_data_of_another_tokenizer(self):
        write_tokens(self.prefix, [np.array([1, 2, 256])])
        self.refused("inspect", self.prefix, "--tokenizer", self.root / "bytes", words=["has id 256, but the tokenizer of", "knows ids up to 255"])


if __name__ == "__main__":
    tiny_run.UPCYCLE = os.path.abspath(sys.argv.pop(1))
    unittest.main()
