"""What the tests of tools/preprocess share: documents of all kinds, and the tool in a directory of its own."""
import contextlib
import io
import json
import os
import sys
import tempfile
import unittest
from pathlib import Path

import numpy

import tool_module

tool = tool_module.load("preprocess")
import tokenizers_for_tests as make
import user_error

TOOL = tool_module.TOOLS / "preprocess"
END = 0  # <|endoftext|> of make.qwen


def texts(count, seed=1, longest=2000):
    """Documents of all lengths from words, spaces, line ends, and characters of several bytes."""
    rng = numpy.random.default_rng(seed)
    words = "What is a mixture of experts? router \n \n\n     def f(x): naïve 你好，世界 🙂 “quotes” <|endoftext|> 0123 é".split(" ") + [" ", "  "]
    return [" ".join(rng.choice(words, rng.integers(1, longest))) for _ in range(count)]


def json_lines(documents, key="text"):
    return "".join(json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(documents))


class Preprocessing(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory(prefix="upcycle-preprocess-")
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        self.tokenizer = make.qwen(self.folder / "tokenizer", eos="<|endoftext|>")

    def command(self, *arguments, output="out", tokenizer=None):
        return [sys.executable, str(TOOL), *map(str, arguments), "--tokenizer", str(tokenizer or self.tokenizer), "--output",
                str(self.folder / output)]

    def run_tool(self, *arguments, code=0, says="", **options):
        """In this process, as the tool's last line does it; (what it prints, its errors). Interruptions start processes."""
        said, errors, status = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
            try:
                user_error.run("tools/preprocess", lambda: tool.main(self.command(*arguments, **options)[2:]))
            except SystemExit as end:
                status = end.code
        said, errors = said.getvalue(), errors.getvalue()
        self.assertEqual(status, code, said + errors)
        self.assertIn(says, errors if code else said)
        if code:
            self.assertEqual(len(errors.splitlines()), 1, errors)
            self.assertTrue(errors.startswith("tools/preprocess: "), errors)
        return said, errors

    def write(self, name, content):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def expected(self, documents, tokenizer=None):
        """What transformers makes of the texts, and the end."""
        from transformers import PreTrainedTokenizerFast
        encoder = PreTrainedTokenizerFast.from_pretrained(tokenizer or self.tokenizer)
        return [encoder(text, split_special_tokens=True)["input_ids"] + [END] for text in documents]

    def bytes_of(self, output="out"):
        return [(self.folder / f"{output}.{ending}").read_bytes() for ending in ("bin", "idx")]
