#!/usr/bin/env python3
"""tools/make-corpus, and tools/preprocess on what it makes: the same bytes every time, Megatron's format, a tokenizer that transformers
loads, and errors that leave nothing behind."""
import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import unicodedata
import unittest
from pathlib import Path

import tool_module
from indexed_reader import read_indexed

TOOL = tool_module.TOOLS / "make-corpus"
SMALL = ("--bytes", "6e5", "--vocab", "400")


def run(*arguments):
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=200)


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Corpus(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory(prefix="upcycle-corpus-")
        cls.folder = Path(cls.temporary.name) / "corpus"
        cls.first = run(cls.folder, *SMALL)
        assert cls.first.returncode == 0, cls.first.stderr
        for part in ("train", "validation"):
            tokens = subprocess.run([sys.executable, str(TOOL.with_name("preprocess")), str(cls.folder / f"{part}.jsonl"), "--tokenizer",
                                     str(cls.folder / "tokenizer"), "--output", f"{cls.temporary.name}/{part}"],
                                    capture_output=True, text=True, timeout=200)
            assert tokens.returncode == 0, tokens.stderr

    def tokens(self, part):
        return read_indexed(f"{self.temporary.name}/{part}")

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def files(self):
        """(digest, bytes, part, path) as files.txt lists them."""
        site = Path(importlib.metadata.distribution("numpy").locate_file(""))
        for line in (self.folder / "files.txt").read_text().splitlines():
            digest, size, part, name = line.split(maxsplit=3)
            yield digest, int(size), part, site / name

    def test_same_files_same_bytes(self):
        again = Path(self.temporary.name) / "again"
        self.assertEqual(run(again, *SMALL).returncode, 0)
        one, two = contents(self.folder), contents(again)
        self.assertEqual(sorted(one), ["corpus.json", "files.txt", "tokenizer/generation_config.json", "tokenizer/tokenizer.json",
                                       "tokenizer/tokenizer_config.json", "train.jsonl", "validation.jsonl"])
        self.assertEqual(list(one), list(two))
        for name in one:
            self.assertEqual(one[name], two[name], name)

    def test_second_run_does_nothing(self):
        before = {path: path.stat().st_mtime_ns for path in self.folder.rglob("*")}
        again = run(self.folder, *SMALL)
        self.assertEqual(again.returncode, 0)
        self.assertTrue(again.stdout.startswith("already there"), again.stdout)
        self.assertEqual(before, {path: path.stat().st_mtime_ns for path in self.folder.rglob("*")})

    def test_tokens_are_the_listed_files(self):
        from tokenizers import Tokenizer
        tokenizer = Tokenizer.from_file(str(self.folder / "tokenizer/tokenizer.json"))
        end = tokenizer.token_to_id("<|endoftext|>")
        documents = {part: self.tokens(part) for part in ("train", "validation")}
        listed = {"train": [], "validation": []}
        total, names = 0, []
        for digest, size, part, path in self.files():
            content = path.read_bytes()
            self.assertEqual((hashlib.sha256(content).hexdigest(), len(content)), (digest, size), path)
            listed[part].append(unicodedata.normalize("NFC", content.decode()))
            total += size
            names.append(str(path))
        self.assertEqual(names, sorted(names))
        self.assertLessEqual(total, 600_000)
        self.assertGreater(total, 400_000)
        self.assertFalse(set(listed["train"]) & set(listed["validation"]))
        self.assertGreater(len(listed["validation"]), 0)
        self.assertEqual(len(listed["validation"]), len(names) // 20)
        for part in listed:
            self.assertEqual(len(documents[part]), len(listed[part]))
            for tokens, text in zip(documents[part], listed[part]):
                self.assertEqual(tokens[-1], end)
                self.assertNotIn(end, tokens[:-1])
                self.assertLess(max(tokens), 400)
                self.assertEqual(tokenizer.decode(tokens[:-1], skip_special_tokens=False), text)

    def test_report_says_what_it_is(self):
        report = json.loads((self.folder / "corpus.json").read_text())
        listing = (self.folder / "files.txt").read_bytes()
        self.assertEqual(report["sha256_of_list"], hashlib.sha256(listing).hexdigest())
        self.assertIn(report["sha256_of_list"], self.first.stdout)
        self.assertEqual(report["files"], len(listing.splitlines()))
        self.assertIn(f"{report['files']} files, {report['total_bytes']} bytes", self.first.stdout)
        for part in ("train", "validation"):
            texts = [json.loads(line)["text"] for line in (self.folder / f"{part}.jsonl").read_text().split("\n")[:-1]]
            self.assertEqual(report[part], {"documents": len(texts), "bytes": sum(len(text.encode()) for text in texts)})
        self.assertIn("torch 2.11.0", self.first.stdout)

    def test_transformers_loads_the_tokenizer(self):
        from transformers import AutoTokenizer
        with tempfile.TemporaryDirectory() as model:
            for path in (self.folder / "tokenizer").iterdir():
                (Path(model) / path.name).write_bytes(path.read_bytes())
            (Path(model) / "config.json").write_text(json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}))
            for folder in (self.folder / "tokenizer", model):  # by itself, and beside a model's config.json
                tokenizer = AutoTokenizer.from_pretrained(folder)
                self.assertEqual(len(tokenizer), 400)
                self.assertEqual(tokenizer.eos_token, "<|endoftext|>")
                self.assertIn(tokenizer.eos_token_id, tokenizer("a<|endoftext|>")["input_ids"])
                held_out = self.tokens("validation")
                texts = [path.read_bytes().decode() for _, _, part, path in self.files() if part == "validation"]
                for tokens, text in zip(held_out, texts):
                    if "<|endoftext|>" in text:
                        continue
                    self.assertEqual(tokenizer(text)["input_ids"], tokens[:-1])
                    self.assertEqual(tokenizer.decode(tokens[:-1]), unicodedata.normalize("NFC", text))

    def test_other_options_leave_it_alone(self):
        before = contents(self.folder)
        other = run(self.folder, "--bytes", "6e5", "--vocab", "401")
        self.assertEqual(other.returncode, 2)
        self.assertIn("made with other options", other.stderr)
        self.assertEqual(before, contents(self.folder))

    def test_all_installed_packages(self):
        """Those that no list pins, too: and what the text was made of is written down."""
        folder = Path(self.temporary.name) / "all"
        made = run(folder, *SMALL, "--packages", "all")
        self.assertEqual(made.returncode, 0, made.stderr)
        told = json.loads((folder / "corpus.json").read_text())
        self.assertGreater(set(told["packages"]), set(json.loads((self.folder / "corpus.json").read_text())["packages"]))
        self.assertEqual(told["packages"]["numpy"], importlib.metadata.version("numpy"))
        self.assertNotEqual((folder / "files.txt").read_bytes(), (self.folder / "files.txt").read_bytes())

    def test_one_of_an_older_version_is_named(self):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "corpus.json").write_bytes((self.folder / "corpus.json").read_bytes())
            result = run(folder, *SMALL)
            self.assertEqual(result.returncode, 2)
            self.assertIn("an older tools/make-corpus made it", result.stderr)

    def test_errors_leave_nothing_behind(self):
        with tempfile.TemporaryDirectory() as empty:
            for options, message in (
                (("--vocab", "256"), "257 tokens at least"),
                (("--bytes", "20000"), "20 are needed"),
                (("--bytes", "3e5", "--vocab", "40000"), "needs more --bytes"),
            ):
                result = run(Path(empty) / "new", *options)
                self.assertEqual(result.returncode, 2, result)
                self.assertIn(message, result.stderr)
                self.assertNotIn("Traceback", result.stderr)
                self.assertEqual(os.listdir(empty), [])
            (Path(empty) / "mine").write_text("mine")
            result = run(empty, *SMALL)
            self.assertEqual(result.returncode, 2)
            self.assertIn("holds no corpus", result.stderr)
            self.assertEqual(os.listdir(empty), ["mine"])


if __name__ == "__main__":
    unittest.main()
