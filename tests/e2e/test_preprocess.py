#!/usr/bin/env python3
"""tools/preprocess: every kind of input, what tokenizers ask for, progress."""
import fcntl
import gzip
import os
import pty
import struct
import subprocess
import termios
import unittest

import tokenizers_for_tests as make
from indexed_reader import read_indexed
from preprocessing import END, Preprocessing, json_lines, texts


class Inputs(Preprocessing):
    def test_every_kind_of_file_gives_the_same_documents(self):
        import pyarrow
        import pyarrow.parquet
        documents = texts(40)
        lines = json_lines(documents)
        self.write("a.jsonl", lines)
        self.write("b.jsonl.gz", gzip.compress(lines[:5000].encode()) + gzip.compress(lines[5000:].encode()))  # of two members
        with pyarrow.output_stream(str(self.folder / "c.jsonl.zst"), compression="zstd") as file:
            file.write(lines.encode())
        self.write("bom.jsonl", b"\xef\xbb\xbf" + lines.replace("\n", "\r\n\r\n").encode())  # byte order mark, empty lines
        table = pyarrow.table({"id": range(40), "text": documents})
        pyarrow.parquet.write_table(table, self.folder / "d.parquet", row_group_size=7)
        for i, text in enumerate(documents):
            self.write(f"texts/{i:02}.txt", text)
        self.write("texts/.hidden.txt", "hidden")
        self.write("texts/ignored.bin", b"\xff")
        self.write("split.txt", "".join(text + "\n=====\n" for text in documents))
        wanted = None
        for output, *arguments in (
            ("a", "a.jsonl"), ("b", "b.jsonl.gz"), ("c", "c.jsonl.zst"), ("d", "d.parquet", "--shard", "50kB"), ("bom", "bom.jsonl"),
            ("e", "texts", "--shard", "20kB"), ("f", "texts/*.txt"), ("g", "split.txt", "--split-on", "====="),
        ):
            with self.subTest(output):
                self.run_tool(*arguments, output=output, says="tokens in 40 documents")
                wanted = wanted or self.expected(documents)
                self.assertEqual(read_indexed(self.folder / output), wanted)
        self.assertIn("<|endoftext|>", "".join(documents))  # and yet text: the only END is the last
        self.assertTrue(all(END not in document[:-1] for document in wanted))
        self.run_tool("b.jsonl.gz", "a.jsonl", "texts", output="all", says="tokens in 120 documents")
        self.assertEqual(read_indexed(self.folder / "all"), wanted * 3)

    def test_keys_empty_documents_and_special_tokens(self):
        self.write("a.jsonl", json_lines(["Hello", "", "a<|endoftext|>b"], key="body"))
        self.run_tool("a.jsonl", "--key", "body", says="in 2 documents, 1 empty ones left out")
        self.assertEqual(read_indexed(self.folder / "out"), self.expected(["Hello", "a<|endoftext|>b"]))
        self.run_tool("a.jsonl", "--key", "body", "--special-tokens", output="special")
        self.assertEqual(read_indexed(self.folder / "special")[1].count(END), 2)
        self.run_tool("a.jsonl", "--key", "body", "--eod", "<|im_end|>", output="other")
        self.assertEqual([document[-1] for document in read_indexed(self.folder / "other")], [2, 2])

    def test_what_a_tokenizer_file_asks_for(self):
        """Truncation and padding in tokenizer.json are for short inputs, and not done; its <bos> is; its <eos> is not doubled."""
        from tokenizers import Tokenizer, processors
        llama = make.llama(self.folder / "llama")
        tokenizer = Tokenizer.from_file(str(llama / "tokenizer.json"))
        plain = tokenizer.encode("Hello there, how are you?", add_special_tokens=False).ids
        self.assertGreater(len(plain), 4)
        tokenizer.enable_truncation(4)
        tokenizer.enable_padding(length=32)
        truncated = make.save(self.folder / "truncated", tokenizer, eos_token="<|eot_id|>")
        self.write("a.jsonl", json_lines(["Hello there, how are you?", "Hello"]))
        self.run_tool("a.jsonl", tokenizer=truncated)
        self.assertEqual(read_indexed(self.folder / "out")[0], [0, *plain, 4])
        tokenizer.post_processor = processors.TemplateProcessing(single="$A <|eot_id|>", pair="$A $B", special_tokens=[("<|eot_id|>", 4)])
        ending = make.save(self.folder / "ending", tokenizer, eos_token={"content": "<|eot_id|>"})
        self.run_tool("a.jsonl", tokenizer=ending, output="ending-out")
        self.assertEqual(read_indexed(self.folder / "ending-out")[0], [*plain, 4])

    def test_large_vocabularies_take_four_bytes(self):
        from tokenizers import Tokenizer, models, pre_tokenizers
        self.write("a.jsonl", json_lines(["a b a", "b"]))
        for largest, width in ((65498, 2), (65499, 4), (151642, 4)):
            tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": largest, "<end>": 1}, "a"))
            tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
            folder = make.save(self.folder / str(largest), tokenizer, eos_token="<end>")
            self.run_tool("a.jsonl", tokenizer=folder, output=f"out-{largest}")
            self.assertEqual(read_indexed(self.folder / f"out-{largest}"), [[0, largest, 0, 1], [largest, 1]])
            self.assertEqual((self.folder / f"out-{largest}.bin").stat().st_size, 6 * width)

    def test_end_token_of_generation_config(self):
        (self.tokenizer / "tokenizer_config.json").write_text("{}")
        (self.tokenizer / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
        self.write("a.jsonl", json_lines(["Hello"]))
        self.run_tool("a.jsonl", says="end of document: <|im_end|> (2, eos_token_id 2 of")
        self.assertEqual(read_indexed(self.folder / "out")[0][-1], 2)

    def test_progress(self):
        """A bar on a terminal, and none in a file."""
        self.write("a.jsonl", json_lines(texts(20)))
        self.assertNotIn("%", self.run_tool("a.jsonl")[1])
        ours, theirs = pty.openpty()
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        process = subprocess.Popen(self.command("a.jsonl", output="bar"), stderr=theirs, stdout=subprocess.DEVNULL)
        os.close(theirs)
        shown = b""
        try:
            while block := os.read(ours, 4096):
                shown += block
        except OSError:
            pass  # how a terminal says that nobody writes to it any more
        os.close(ours)
        self.assertEqual(process.wait(), 0)
        self.assertIn(b"100%", shown)
        self.assertIn(b"M tokens", shown)


if __name__ == "__main__":
    unittest.main()
