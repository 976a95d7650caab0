#!/usr/bin/env python3
"""tools/preprocess: every kind of input, the same bytes for any number of workers and after any interruption, Megatron's format (read
and written by Megatron itself where megatron.core is installed), and what it refuses."""
import contextlib
import fcntl
import gzip
import importlib.machinery
import importlib.util
import io
import json
import os
import pty
import resource
import struct
import subprocess
import sys
import tempfile
import termios
import time
import unittest
from pathlib import Path

import numpy

sys.dont_write_bytecode = True  # the tools lie in the source tree
TOOL = Path(__file__).resolve().parents[2] / "tools/preprocess"
sys.path.insert(0, str(TOOL.parent))
import indexed
import tokenizers_for_tests as make
import user_error
from test_corpus import read_indexed
from user_error import UserError

loader = importlib.machinery.SourceFileLoader("preprocess", str(TOOL))
tool = importlib.util.module_from_spec(importlib.util.spec_from_loader("preprocess", loader))
loader.exec_module(tool)

END = 0  # <|endoftext|> of make.qwen


def texts(count, seed=1, longest=2000):
    """Documents of all lengths from words, spaces, line ends, and characters of several bytes."""
    rng = numpy.random.default_rng(seed)
    words = "What is a mixture of experts? router \n \n\n     def f(x): naïve 你好，世界 🙂 “quotes” <|endoftext|> 0123 é".split(" ") + [" ", "  "]
    return [" ".join(rng.choice(words, rng.integers(1, longest))) for _ in range(count)]


def json_lines(documents, key="text"):
    return "".join(json.dumps({"id": i, key: text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(documents))


class Base(unittest.TestCase):
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
        """In this process, as the tool's last line does it; (what it prints, its errors). Interruptions starts processes."""
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


class Inputs(Base):
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


class Interruptions(Base):
    def setUp(self):
        super().setUp()
        self.documents = texts(400, longest=1500)
        self.source = self.write("a.jsonl", json_lines(self.documents))
        self.options = (self.source, "--shard", "80kB")

    def uninterrupted(self):
        self.run_tool(self.source, output="whole")
        return self.bytes_of("whole")

    def test_any_number_of_workers(self):
        whole = self.uninterrupted()
        self.assertEqual(read_indexed(self.folder / "whole"), self.expected(self.documents))
        for workers, shard in ((1, "80kB"), (2, "33kB"), (5, "5kB")):  # many lines are longer than 5 kB
            output = f"out-{workers}"
            self.run_tool(self.source, "--workers", workers, "--shard", shard, output=output)
            self.assertEqual(self.bytes_of(output), whole)
        self.assertEqual([path.name for path in self.folder.glob("*.parts")], [])
        self.assertEqual([path.name for path in self.folder.glob("*.partial")], [])

    def test_killed(self):
        whole = self.uninterrupted()
        parts = self.folder / "out.parts"
        process = subprocess.Popen(self.command(*self.options), stdout=subprocess.PIPE)
        deadline = time.monotonic() + 100
        while len(list(parts.glob("*[0-9a-f].json"))) < 3:
            self.assertIsNone(process.poll(), "it was done before it could be killed")
            self.assertLess(time.monotonic(), deadline)
            time.sleep(0.005)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        process.communicate()
        self.assertTrue(workers)
        self.assertFalse((self.folder / "out.bin").exists())
        said, _ = self.run_tool(*self.options)
        stat = [Path(f"/proc/{pid}/stat") for pid in workers]
        self.assertFalse([path for path in stat if path.exists() and path.read_text().rsplit(")", 1)[1].split()[0] != "Z"])
        self.assertRegex(said, r"\n[3-9]\d* of \d+ shards are in \S+out.parts already\n")
        self.assertEqual(self.bytes_of(), whole)

    def test_worker_killed(self):
        """As the kernel does where memory is short."""
        whole = self.uninterrupted()
        process = subprocess.Popen(self.command(*self.options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not list((self.folder / "out.parts").glob("*[0-9a-f].json")):
            self.assertIsNone(process.poll())
            time.sleep(0.005)
        worker = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1]
        os.kill(int(worker), 9)
        said, errors = process.communicate()
        self.assertEqual(process.returncode, 2, errors)
        self.assertIn("tools/preprocess: a worker was killed, perhaps for lack of memory", errors)
        self.assertIn("kept in", said)
        self.run_tool(*self.options, says="already")
        self.assertEqual(self.bytes_of(), whole)

    def test_killed_between_the_names_of_the_result(self):
        """<prefix>.bin has its name, <prefix>.idx and the report have not: no other run's, so it is made again."""
        whole = self.uninterrupted()
        process = subprocess.Popen([sys.executable, "-c", f"""
import os, sys
sys.path.insert(0, {str(TOOL.parent)!r})
import indexed
def publish(paths):
    if str(paths[0]).endswith("out.bin"):
        os.replace(indexed.partial(paths[0]), paths[0])
        os.kill(os.getpid(), 9)
    real(paths)
real, indexed.publish = indexed.publish, publish
sys.argv = {self.command(*self.options)[1:]!r}
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""], stdout=subprocess.PIPE)
        process.communicate()
        self.assertEqual(process.returncode, -9)
        self.assertTrue((self.folder / "out.bin").exists() and not (self.folder / "out.idx").exists())
        said, _ = self.run_tool(*self.options)
        shards = len(range(0, self.source.stat().st_size, 80_000))
        self.assertIn(f"{shards} of {shards} shards are in", said)
        self.assertEqual(self.bytes_of(), whole)

    def test_full_disk(self):
        """As root on a file system of 1 MB, which then grows; else under a limit on the size of files, which then goes."""
        whole = self.uninterrupted()
        disk = self.folder / "disk"
        disk.mkdir()
        mounted = os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]).returncode == 0
        try:
            if mounted:
                self.assertGreater(len(whole[0]), 500_000)  # twice that does not fit
                said, _ = self.run_tool(*self.options, output="disk/out", code=2, says="the disk is full")
                subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
            else:
                limit = len(whole[0]) // 2
                result = subprocess.run(self.command(*self.options, output="disk/out"), capture_output=True, text=True,
                                        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
                self.assertEqual(result.returncode, 2, result.stderr)
                self.assertIn("may not grow any further", result.stderr)
                said = result.stdout
            self.assertRegex(said, r"[1-9]\d* of \d+ shards are finished and kept in .*disk/out.parts: the same command goes on")
            self.assertFalse((disk / "out.bin").exists())
            self.run_tool(*self.options, output="disk/out", says="already")
            self.assertEqual(self.bytes_of("disk/out"), whole)
        finally:
            if mounted:
                subprocess.run(["umount", str(disk)], check=True)

    def test_stopped_by_the_keyboard(self):
        process = subprocess.Popen(self.command(*self.options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not list((self.folder / "out.parts").glob("*[0-9a-f].json")):
            self.assertIsNone(process.poll())
            time.sleep(0.005)
        process.send_signal(2)
        said, errors = process.communicate()
        self.assertEqual(process.returncode, 130, errors)
        self.assertIn("kept in", said)
        self.assertEqual(errors, "\ntools/preprocess: stopped\n")
        self.run_tool(*self.options, says="already")
        self.assertEqual(read_indexed(self.folder / "out"), self.expected(self.documents))

    def test_second_run_and_other_options(self):
        self.run_tool(*self.options)
        before = {path: path.stat().st_mtime_ns for path in self.folder.glob("out.*")}
        self.assertEqual(len(before), 3)
        self.run_tool(*self.options, says="already there")
        self.run_tool(self.source, "--workers", 1, says="already there")  # neither decides the bytes
        self.run_tool(*self.options, "--eod", "<|im_end|>", code=2, says="was made with other options or inputs (end token;")
        other = self.write("other.jsonl", json_lines(["Hello"]))
        self.run_tool(self.source, other, code=2, says="was made with other options or inputs (inputs;")
        self.assertEqual(before, {path: path.stat().st_mtime_ns for path in self.folder.glob("out.*")})
        (self.folder / "out.idx").write_bytes(b"")
        self.run_tool(*self.options, code=2, says="have not the sizes")
        (self.folder / "foreign.bin").write_bytes(b"mine")
        self.run_tool(*self.options, output="foreign", code=2, says="foreign.bin exists")
        self.assertEqual((self.folder / "foreign.bin").read_bytes(), b"mine")

    def test_exit_codes(self):
        for arguments, code, message in (((self.source,), 0, ""), ((self.source, "--eod", "<end>"), 2, "tools/preprocess: --eod is '<end>'"),
                                         ((self.folder / "missing.txt",), 2, "missing.txt: no such file"), ((), 2, "usage:")):
            result = subprocess.run(self.command(*arguments), capture_output=True, text=True)
            self.assertEqual(result.returncode, code, result)
            self.assertIn(message, result.stderr)

    def test_one_more_input_keeps_the_finished_shards(self):
        """A bad line in the second file ends the run; repaired, only its shard is made."""
        second = self.write("b.jsonl", json_lines(["Hello"]) + "{broken\n")
        said, _ = self.run_tool(*self.options, second, "--workers", 1, code=2, says=f"{second}, line 2 is not JSON")
        shards = len(range(0, self.source.stat().st_size, 80_000))
        self.assertIn(f"{shards} of {shards + 1} shards are finished and kept", said)
        second.write_text(json_lines(["Hello", "there"]))
        self.run_tool(*self.options, second, says=f"{shards} of {shards + 1} shards are in")
        self.assertEqual(read_indexed(self.folder / "out"), self.expected([*self.documents, "Hello", "there"]))

    def test_two_at_once(self):
        (self.folder / "out.parts").mkdir()
        with open(self.folder / "out.parts/lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.run_tool(*self.options, code=2, says="another tools/preprocess is writing to")
        self.run_tool(*self.options)


class Refusals(Base):
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
            ("blank.jsonl", "\n \n", "there is nothing to write"),
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


class Format(Base):
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
