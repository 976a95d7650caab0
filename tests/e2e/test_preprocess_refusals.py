#!/usr/bin/env python3
"""tools/preprocess: what it refuses, each by one message that names file, line and what to do."""
import gzip
import json
import os
import unittest

from chat_templates import CHATML
from preprocessing import Preprocessing, json_lines
from user_error import UserError


class Refusals(Preprocessing):
    def test_inputs(self):
        """One message each, with file, line and what to do; no result."""
        good = json_lines(["Hello", "there"])
        os.mkfifo(self.folder / "pipe.jsonl")
        (self.folder / "nowhere").symlink_to("missing.jsonl")
        (self.folder / "folder").mkdir()
        cases = [
            ("utf8.jsonl", good.encode() + b'{"text": "caf\xe9"}\n', "utf8.jsonl, line 3: not UTF-8: byte 0xe9 at byte 14 of the line"),
            ("utf8.txt", b"first\nsec\xffond", "utf8.txt, line 2: not UTF-8: byte 0xff at byte 4"),
            ("utf16.txt", "Hello".encode("utf-16"), "utf16.txt, line 1: not UTF-8"),
            ("empty.jsonl", b"", "empty.jsonl is empty; remove it"),
            ("nothing.jsonl", json_lines(["", ""]), "all 2 documents of the input are empty"),
            ("blank.jsonl", "\n \n", "the input has no documents: there is nothing to write"),
            ("json.jsonl", good + '{"text": "a"\n', "json.jsonl, line 3 is not JSON: Expecting ',' delimiter at column"),
            ("array.jsonl", '[\n{"text": "a"}\n]\n', "array.jsonl, line 1 is not JSON: one object a line is wanted"),
            ("number.jsonl", good + "3\n", "number.jsonl, line 3 is of type int; an object"),
            ("deep.jsonl", '{"text": ' + "[" * 100_000 + "\n", "deep.jsonl, line 1: the JSON is nested too deeply"),
            ("digits.jsonl", good + '{"text": "a", "n": ' + "9" * 5000 + "}\n", "digits.jsonl, line 3 can't be read as JSON"),
            ("key.jsonl", good + '{"body": "a", "id": 3}\n', "key.jsonl, line 3: no key \"text\"; it has 'body', 'id': choose one by --key"),
            ("null.jsonl", good + '{"text": null}\n', 'null.jsonl, line 3: "text" is null, not text'),
            ("list.jsonl", good + '{"text": ["a"]}\n', 'list.jsonl, line 3: "text" is list, not text'),
            ("half.jsonl", good + '{"text": "a\\ud83d"}\n', "half.jsonl, line 3: the text has half of a surrogate pair, \\ud83d"),
            ("cut.jsonl.gz", gzip.compress(good.encode())[:-9], "cut.jsonl.gz is damaged or was cut off"),
            ("no.jsonl.gz", good, "no.jsonl.gz is damaged or was cut off: Not a gzipped file"),
            ("no.jsonl.zst", good, "no.jsonl.zst is damaged or was cut off"),
            ("no.parquet", good, "no.parquet is not a Parquet file, or damaged"),
            ("name.csv", good, "name.csv: its name does not say what it is"),
            ("missing.jsonl", None, "missing.jsonl: no such file"),
            ("*.warc", None, "*.warc: no such file, and nothing matches it"),
            ("nowhere", None, "nowhere: No such file or directory"),
            ("pipe.jsonl", None, "pipe.jsonl is not a regular file"),
            ("folder", None, "folder: no file in this directory ends in .jsonl"),
        ]
        for name, content, message in cases:
            with self.subTest(name):
                if content is not None:
                    self.write(name, content)
                self.run_tool(name, code=2, says=message)
                self.assertFalse((self.folder / "out.bin").exists())
        self.run_tool("utf8.txt", "./utf8.txt", code=2, says="./utf8.txt is given twice (as utf8.txt)")
        # The number of a line in a shard that begins in the middle of the file.
        self.write("far.jsonl", json_lines(["word " * 50] * 500) + "broken\n")
        self.run_tool("far.jsonl", "--shard", "7kB", code=2, says="far.jsonl, line 501 is not JSON")

    def test_parquet(self):
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b", None], "n": [1, 2, 3]}), self.folder / "a.parquet", row_group_size=1)
        self.run_tool("a.parquet", code=2, says='a.parquet, row 3: "text" is null')
        self.run_tool("a.parquet", "--key", "body", code=2, says="a.parquet has no column body; it has text, n: choose one by --key")
        self.run_tool("a.parquet", "--key", "n", code=2, says='a.parquet, row 1: "n" is int, not text')
        with pyarrow.parquet.ParquetWriter(self.folder / "none.parquet", pyarrow.schema([("text", pyarrow.string())])):
            pass  # no row group, as a writer leaves it that was given no rows
        chat = ("--chat", "--template", self.write("chatml.jinja", CHATML))
        for arguments in (("none.parquet",), ("none.parquet", *chat), ("a.parquet", "none.parquet", "--key", "n")):
            self.run_tool(*arguments, code=2, says="none.parquet has no row groups, and so no documents; remove it or leave it out")
        pyarrow.parquet.write_table(pyarrow.table({"text": [], "messages": []}), self.folder / "rowless.parquet")  # a row group without rows
        for arguments in (("rowless.parquet",), ("rowless.parquet", *chat)):
            self.run_tool(*arguments, code=2, says="the input has no documents: there is nothing to write")

    def test_tokenizers(self):
        self.write("a.jsonl", json_lines(["Hello"]))
        largest = max(json.loads((self.tokenizer / "tokenizer.json").read_text())["added_tokens"], key=lambda token: token["id"])["id"]
        config = self.write("config.json", f'{{"vocab_size": {largest}}}')
        self.run_tool("a.jsonl", "--model", config, code=2, says=f"the largest id of {self.tokenizer}/tokenizer.json is {largest}, but the "
                      f"model in {config} has a vocab_size of {largest}: ids 0 to {largest - 1}")
        self.run_tool("a.jsonl", "--model", self.tokenizer, code=2, says="tokenizer/config.json: no such file")
        self.write("bad/config.json", "{}")
        self.run_tool("a.jsonl", "--model", self.folder / "bad", code=2, says="config.json has no vocab_size")
        config.write_text(f'{{"vocab_size": {largest + 1}}}')
        self.run_tool("a.jsonl", "--model", config, output="fits")
        self.run_tool("a.jsonl", "--split-on", "", code=2, says="--split-on is for plain text, and none of the inputs is")
        self.run_tool("a.jsonl", "--eod", "<end>", code=2, says="--eod is '<end>', which is no token of")
        settings = self.tokenizer / "tokenizer_config.json"
        settings.write_text("{}")
        self.run_tool("a.jsonl", code=2, says="the tokenizer has no end token")
        self.run_tool("a.jsonl", code=2, says="name the token that ends a document by --eod TOKEN")
        settings.write_text('{"eos_token": "</s>"}')
        self.run_tool("a.jsonl", code=2, says="is '</s>', which is no token of")
        settings.write_text("[]")
        self.run_tool("a.jsonl", code=2, says="tokenizer_config.json holds a value of type list")
        settings.write_text("{")
        self.run_tool("a.jsonl", code=2, says="tokenizer_config.json is not JSON")
        self.run_tool("a.jsonl", tokenizer=self.folder, code=2, says=f"{self.folder}/tokenizer.json: no such file")
        self.write("broken/tokenizer.json", "{}")
        self.run_tool("a.jsonl", tokenizer=self.folder / "broken", code=2, says="tokenizers can't read it")
        for output in ("out.bin", "out.idx"):
            self.run_tool("a.jsonl", output=output, code=2, says="the name without .bin and .idx is wanted")
        self.run_tool("a.jsonl", "--workers", 0, code=2, says="--workers 0: at least 1")
        self.run_tool("a.jsonl", "--chat", "--key", "text", code=2, says="--key and --split-on are for texts")
        self.run_tool("a.jsonl", "--template-args", "{}", "--template", "x", code=2, says="are for --chat")
        self.assertEqual([path.name for path in self.folder.glob("out*")], [])

    def test_a_file_that_changes(self):
        import documents
        path = self.write("a.jsonl", json_lines(["Hello", "there"]))
        shard, = documents.cut(documents.find([str(path)], None), 1 << 20)
        with self.assertRaisesRegex(UserError, "a.jsonl has changed while it was read"):
            for place, _ in documents.read(shard, ("text",), None, lambda here: None):
                path.write_text(json_lines(["Hello", "there", "you"]))


if __name__ == "__main__":
    unittest.main()
