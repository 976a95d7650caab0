#!/usr/bin/env python3
"""tools/indexed.py: Megatron's format, also at its limits; against files that Megatron wrote, and Megatron itself where megatron.core is
installed."""
import importlib.util
import json
import os
import struct
import unittest
from pathlib import Path

import numpy

from preprocessing import Preprocessing, json_lines, texts
import indexed
from user_error import UserError

MEGATRON = Path(__file__).resolve().parents[1] / "fixtures/megatron"


class Format(Preprocessing):
    def test_longest_document(self):
        """2^31 tokens of no memory: what one more than fits into an i32 does."""
        writer = indexed.Writer(self.folder / "x", numpy.uint8)
        with self.assertRaisesRegex(UserError, r"a.txt: 2147483648 tokens, but a document of Megatron's format has at most 2147483647"):
            writer.add(numpy.broadcast_to(numpy.uint8(0), 2**31), "a.txt")
        indexed.check_length(2**31 - 1, "a.txt")
        self.assertEqual(numpy.array([2**31 - 1]).astype(numpy.int32)[0], 2**31 - 1)
        self.assertEqual(os.path.getsize(self.folder / "x.bin.partial"), 0)
        writer.abandon()
        self.assertEqual(list(self.folder.glob("x*")), [])

    def test_offsets_beyond_four_gigabytes(self):
        lengths = numpy.full(5, 2**31 - 1, dtype=numpy.int32)
        indexed.write_index(self.folder / "x", numpy.dtype(numpy.int32), lambda: iter([lengths[:2], lengths[2:]]))
        index = (self.folder / "x.idx.partial").read_bytes()
        self.assertEqual(struct.unpack("<9sQBQQ", index[:34]), (b"MMIDIDX\0\0", 1, 4, 5, 6))
        self.assertEqual(struct.unpack("<5i5q6q", index[34:]), (2**31 - 1,) * 5 + tuple(4 * i * (2**31 - 1) for i in range(5)) +
                         tuple(range(6)))

    def test_reader_on_files_written_from_the_description(self):
        for code, letter, modes in ((1, "B", b""), (4, "i", b""), (8, "H", b"\1\0\1"), (5, "q", b"")):
            documents = [[1, 2, 3], [], [200]]
            width = struct.calcsize(letter)
            (self.folder / "x.bin").write_bytes(struct.pack(f"<4{letter}", 1, 2, 3, 200))
            index = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, 3, 3) + struct.pack("<3i3q3q", 3, 0, 1, 0, 3 * width, 3 * width, 0, 2, 3)
            (self.folder / "x.idx").write_bytes(index + modes)
            reader = indexed.Reader(self.folder / "x")
            self.assertEqual([document.tolist() for document in map(reader.__getitem__, range(len(reader)))], documents)
            self.assertEqual(reader.documents.tolist(), [0, 2, 3])
        for broken, message in ((b"x" + index[1:], "not an index"), (index[:-1], "do not fit"), (index[:20], "not an index"),
                                (index[:34] + struct.pack("<i", 9) + index[38:], "x.bin: 32 bytes, but")):
            (self.folder / "x.idx").write_bytes(broken)
            with self.assertRaisesRegex(UserError, message):
                indexed.Reader(self.folder / "x")

    def test_files_that_megatron_wrote(self):
        """Ours of the same documents are the same bytes, written one by one or merged: so Megatron reads them, too."""
        files = json.loads((MEGATRON / "contents.json").read_text())["files"]
        self.assertEqual(sorted(files), ["int32", "sequences", "uint16", "uint8"])
        for name, content in files.items():
            with self.subTest(name):
                sequences = [sequence for document in content["documents"] for sequence in document]
                reader = indexed.Reader(MEGATRON / name)
                self.assertEqual(reader.dtype, content["dtype"])
                self.assertEqual([reader[i].tolist() for i in range(len(reader))], sequences)
                self.assertEqual(numpy.diff(reader.documents).tolist(), [len(document) for document in content["documents"]])
                if len(sequences) != len(content["documents"]):
                    continue  # ours has one sequence a document
                theirs = [(MEGATRON / f"{name}.{ending}").read_bytes() for ending in ("bin", "idx")]
                writer = indexed.Writer(self.folder / name, content["dtype"])
                for sequence in sequences:
                    writer.add(numpy.array(sequence, numpy.int64))
                writer.finish()
                self.assertEqual(self.bytes_of(name), theirs)
                indexed.merge(self.folder / "merged", [MEGATRON / name], content["dtype"])
                indexed.publish(indexed.files_of(self.folder / "merged"))
                self.assertEqual(self.bytes_of("merged"), theirs)

    @unittest.skipUnless(importlib.util.find_spec("megatron"), "megatron.core is not installed")
    def test_megatron_reads_ours_and_we_read_megatrons(self):
        import torch
        from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder
        documents = texts(30)
        self.write("a.jsonl", json_lines(documents))
        self.run_tool("a.jsonl", "--shard", "10kB")
        wanted = self.expected(documents)
        theirs = IndexedDataset(str(self.folder / "out"))
        self.assertEqual(len(theirs), 30)
        self.assertEqual([document.tolist() for document in theirs], wanted)
        self.assertEqual(theirs.document_indices.tolist(), list(range(31)))
        self.assertEqual(theirs.get(7, 2, 5).tolist(), wanted[7][2:7])
        for dtype in (DType.optimal_dtype(65499), DType.optimal_dtype(151936), numpy.uint8):
            small = [[id_ % 200 for id_ in document] for document in wanted]
            builder = IndexedDatasetBuilder(str(self.folder / "theirs.bin"), dtype=dtype)
            ours = indexed.Writer(self.folder / "ours", dtype)
            for document in small:
                builder.add_document(torch.tensor(document), [len(document)])
                ours.add(numpy.array(document))
            builder.finalize(str(self.folder / "theirs.idx"))
            ours.finish()
            self.assertEqual(self.bytes_of("theirs"), self.bytes_of("ours"))
            self.assertEqual(indexed.token_dtype(65499), DType.optimal_dtype(65499))
            self.assertEqual(indexed.token_dtype(65500), DType.optimal_dtype(65500))
            reader = indexed.Reader(self.folder / "theirs")
            self.assertEqual([reader[i].tolist() for i in range(len(reader))], small)
            if dtype == numpy.uint8:  # a mask
                self.assertEqual([document.tolist() for document in IndexedDataset(str(self.folder / "ours"))], small)


if __name__ == "__main__":
    unittest.main()
