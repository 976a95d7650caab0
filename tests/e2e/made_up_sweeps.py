"""Sweeps made up for the tests of tools/report: directories as `upcycle sweep` leaves them, and the report that comes of them, checked as far
as any report can be."""
import contextlib
import csv
import io
import json
import os
import re
import tempfile
import time
import unittest
from html.parser import HTMLParser
from pathlib import Path

import tool_module

report = tool_module.load("report")
import sweep_compare

TOKENS_PER_STEP = 100
LONG_AGO = time.time() - 3600


class Page(HTMLParser):
    """Checks that tags close as they opened, and gathers text and what would be fetched."""
    VOID = {"meta", "img", "br"}

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.fetched, self.images = [], [], [], 0
        self.feed(text)
        self.close()
        self.text = " ".join("".join(self.words).replace("\u00a0", " ").split())

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.images += tag == "img"
        self.fetched += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]
        if tag in ("script", "link", "iframe", "object"):
            raise AssertionError(f"<{tag}> on the page")

    def handle_endtag(self, tag):
        if tag not in self.VOID and self.open.pop() != tag:
            raise AssertionError(f"</{tag}> closes another tag")
        self.words.append("" if tag in ("b", "code", "span") else " ")

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)


def start(step):
    return {"kind": "start", "step": step, "tokens": TOKENS_PER_STEP * step, "time": "2026-01-01T00:00:00Z", "ranks": 2, "name": "x"}


def step(number, loss=5.0, load=None, dead=0, rate=1000.0):
    line = {"kind": "step", "step": number, "tokens": TOKENS_PER_STEP * number, "loss": loss, "lr": 1e-3, "grad_norm": 1.0,
            "tokens_per_second": rate, "tflops": 0.1, "seconds": TOKENS_PER_STEP / rate, "skipped": False}
    return line if load is None else line | {"load_max_over_mean": load, "dead_experts": dead, "tokens_per_expert": [[1, 3]]}


def validation(number, loss):
    return {"kind": "validation", "step": number, "tokens": TOKENS_PER_STEP * number, "loss": loss}


def dump(line):
    return line if isinstance(line, str) else json.dumps(line, separators=(",", ":"))


class Sweeps(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory(prefix="upcycle-report-")
        self.addCleanup(temporary.cleanup)
        self.folder = Path(temporary.name)

    def arm(self, sweep, name, losses, every=10, seed=1, control=False, settings=None, flops=10.0, steps=None, cannot=None, lines=None,
            end="\n", parameters=1000, **more):
        """An arm of `sweep` for sweep.json; `losses` are its validations, at 0, `every`, ...; None: it has no directory."""
        settings = ({"moe.experts": 0} if control else settings or {"moe.experts": 8}) | {"train.steps": steps or 30}
        settings |= {"run.directory": f"runs/{sweep}/{name}", "run.name": name, "run.seed": seed, "data.seed": 7}
        if losses is not None or lines is not None:
            directory = self.folder / sweep / name
            directory.mkdir(parents=True)
            if lines is None:
                lines = [start(0)]
                for i, loss in enumerate(losses):
                    numbers = range(every * (i - 1) + 1, every * i + 1) if i else ()
                    lines += [step(s, 5 - s / 100, None if control else 1.5, 0 if control else 2) for s in numbers]
                    lines.append(validation(every * i, loss))
            (directory / "metrics.jsonl").write_text("\n".join(map(dump, lines)) + end)
            os.utime(directory / "metrics.jsonl", (LONG_AGO, LONG_AGO))
            if not control:
                (directory / "checkpoints/step-00000000").mkdir(parents=True)
                (directory / "checkpoints/step-00000000/certificate.json").write_text('{"verdict": "passed", "expected": "exact"}')
        one = {"index": 0, "name": name, "control": control, "settings": settings}
        if cannot:
            return one | {"cannot": cannot}
        return one | {"seed": seed, "directory": f"runs/{sweep}/{name}", "steps": steps or 30, "parameters": parameters,
                      "active_parameters": parameters // 2, "flops_per_token": flops, "tokens_per_step": float(TOKENS_PER_STEP)} | more

    def sweep(self, sweep, arms, match="tokens", base="base.toml"):
        (self.folder / sweep).mkdir(exist_ok=True)
        (self.folder / sweep / "sweep.json").write_text(json.dumps({"sweep": f"{sweep}.toml", "base": base, "match": match, "ranks": 2, "arms": arms}))
        return str(self.folder / sweep)

    def run_tool(self, *arguments):
        """(exit code, standard output, standard error)"""
        out, err, code = io.StringIO(), io.StringIO(), 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                report.main([str(argument) for argument in arguments])
            except SystemExit as end:
                code = end.code
        return code, out.getvalue(), err.getvalue()

    def make(self, *directories, out=None):
        """(page, arms by name, validation lines) of a report that must come about."""
        arguments = [*directories] + (["--out", out] if out else [])
        code, said, error = self.run_tool(*arguments)
        self.assertEqual((code, error), (0, ""))
        folder = Path(out or Path(directories[0]) / "report")
        self.assertEqual(said.strip(), str(folder / "report.html"))
        text = (folder / "report.html").read_text(encoding="utf-8")
        self.assertLess(len(text.encode()), 2_000_000)
        page = Page(text)
        self.assertEqual(page.open, [])
        self.assertTrue(all(link.startswith("data:image/") for link in page.fetched), "nothing is fetched")
        self.assertNotRegex(re.sub(r"data:image/[^\"]*", "", text), r"https?:|url\(|@import")
        with open(folder / "arms.csv") as file:
            arms = {row["arm"]: row for row in csv.DictReader(file)}
        with open(folder / "validation.csv") as file:
            return page, arms, list(csv.DictReader(file))

    def compared(self, *directories):
        sweeps = sweep_compare.compare([Path(directory) for directory in directories])
        return sweeps, {arm.name: sweep_compare.row_of(arm, sweeps) for arm in sweeps.arms}

    def refused(self, *arguments, words):
        code, _, said = self.run_tool(*arguments)
        self.assertEqual(code, 2, said)
        for word in words:
            self.assertIn(word, said)
        return said

    def two_seeds(self, sweep="two"):
        """A control and an arm of twice its FLOPs per token, 30 steps, 2 seeds."""
        return self.sweep(sweep, [
            self.arm(sweep, "dense_seed-1", [4.0, 3.5, 3.2, 3.0], control=True),
            self.arm(sweep, "dense_seed-2", [4.0, 3.5, 3.3, 3.4], control=True, seed=2),
            self.arm(sweep, "experts-8_seed-1", [4.0, 3.4, 2.9, 2.7], flops=20.0, parameters=5000),
            self.arm(sweep, "experts-8_seed-2", [4.1, 3.6, 3.1, 2.1], flops=20.0, parameters=5000, seed=2)])
