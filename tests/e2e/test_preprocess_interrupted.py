#!/usr/bin/env python3
"""tools/preprocess: the same bytes for any number of workers and after any interruption."""
import contextlib
import fcntl
import io
import json
import os
import re
import resource
import subprocess
import sys
import time
import unittest
import unittest.mock
from pathlib import Path

from chat_templates import CHATML
from indexed_reader import read_indexed
from preprocessing import TOOL, Preprocessing, json_lines, texts, tool
import indexed

PAGE = resource.getpagesize()


class Interruptions(Preprocessing):
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

    def chats(self):
        """Options for as many conversations as documents."""
        rows = [[{"role": "user", "content": "Hello"}, {"role": "assistant", "content": text.replace("<|endoftext|>", "")}] for text in self.documents]
        source = self.write("chat.jsonl", "".join(json.dumps({"messages": row}) + "\n" for row in rows))
        return source, "--chat", "--template", self.write("chatml.jinja", CHATML), "--shard", "80kB"

    def all_bytes_of(self, output):
        return {path.name: path.read_bytes() for name in (output, f"{output}.mask") for path in indexed.files_of(self.folder / name) if path.exists()}

    def test_full_disk(self):
        """While shards are encoded, while they are merged, and while their masks are. As root on a file system that is too small, and then
        grows; else under a limit on the size of files, which then goes."""
        for name, options in (("shards", self.options), ("merge", self.options), ("masks", self.chats())):
            with self.subTest(name), contextlib.ExitStack() as cleanup:
                whole = self.folder / name / "whole"
                whole.mkdir(parents=True)
                with unittest.mock.patch.object(tool.shutil, "rmtree"):  # so that the shards can be measured
                    self.run_tool(*options, output=whole / "out")
                pages = {path.name: -(path.stat().st_size // -PAGE) for path in whole.rglob("*") if path.is_file()}
                outputs = {file: pages.pop(file) for file in self.all_bytes_of(whole / "out")}
                del pages["out.preprocess.json"]
                room = {"shards": sum(pages.values()) // 2, "merge": sum(pages.values()) + outputs["out.bin"] // 2,
                        "masks": sum(pages.values()) + outputs["out.bin"] + outputs["out.idx"] + outputs.get("out.mask.bin", 0) // 2}[name]
                disk = self.folder / name / "disk"
                disk.mkdir()
                if os.geteuid() == 0 and subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={PAGE * room}", "tmpfs", str(disk)]).returncode == 0:
                    cleanup.callback(subprocess.run, ["umount", str(disk)], check=True)
                    mounted, says = True, "the disk is full"
                else:
                    before = resource.getrlimit(resource.RLIMIT_FSIZE)
                    cleanup.callback(resource.setrlimit, resource.RLIMIT_FSIZE, before)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (PAGE * outputs["out.bin"] // 2, before[1]))
                    mounted, says = False, "the file may not grow any further"
                said, _ = self.run_tool(*options, "--workers", 2, output=disk / "out", code=2, says=says)  # more may leave none finished
                finished, shards = map(int, re.search(r"([1-9]\d*) of (\d+) shards are finished and kept in .*/disk/out.parts: the same", said).groups())
                self.assertEqual(finished < shards, mounted and name == "shards", said)
                self.assertEqual([path.name for path in disk.iterdir()], ["out.parts"])
                self.assertEqual(list(disk.rglob("*.partial")), [])
                if mounted:
                    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
                else:
                    resource.setrlimit(resource.RLIMIT_FSIZE, before)
                self.run_tool(*options, output=disk / "out", says="already")
                self.assertEqual(self.all_bytes_of(disk / "out"), self.all_bytes_of(whole / "out"))

    def test_stopped_while_merging(self):
        """Ctrl-C while any of the files is written leaves nothing but the shards, and what has its name already."""
        options = self.chats()
        self.run_tool(*options, output="whole")
        flush = indexed.flush
        for stopped in ("out.bin", "out.idx", "out.mask.bin", "out.mask.idx", "out.preprocess.json"):
            def interrupted(file):
                if Path(file.name).name == f"{stopped}.partial":
                    raise KeyboardInterrupt
                flush(file)
            with unittest.mock.patch.object(indexed, "flush", interrupted), contextlib.redirect_stdout(io.StringIO()) as said:
                with self.assertRaises(KeyboardInterrupt):
                    tool.main(self.command(*options)[2:])
            self.assertRegex(said.getvalue(), r"([1-9]\d*) of \1 shards are finished and kept in ")
            self.assertEqual(list(self.folder.rglob("*.partial")), [], stopped)
            self.assertFalse((self.folder / stopped).exists())
        self.run_tool(*options, says="already")
        self.assertEqual([*self.all_bytes_of("out").values()], [*self.all_bytes_of("whole").values()])

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


if __name__ == "__main__":
    unittest.main()
