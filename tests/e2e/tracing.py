#!/usr/bin/env python3
"""train --profile: traces that a viewer can open, with the program's ranges rightly nested, and the same training as without.
Usage: tracing.py UPCYCLE [unittest arguments]"""
import json
import os
import re
import sys
import unittest

import tiny_run
from tiny_run import LAYERS, MOE, TrainCase, steps_of


def bars(trace, category=None):
    """[(thread, begin, end, name)] of the complete events, in microseconds, earliest and longest first."""
    found = [(event["tid"], event["ts"], event["ts"] + event["dur"], event["name"]) for event in trace["traceEvents"]
             if event.get("ph") == "X" and (category is None or event.get("cat") == category)]
    return sorted(found, key=lambda bar: (bar[0], bar[1], -bar[2]))


def parents(ranges):
    """{name of a range: names of the ranges right around it}; numbers are left out. Refuses bars that overlap without nesting."""
    around, stack = {}, []
    for thread, begin, end, name in ranges:
        while stack and (stack[-1][0] != thread or stack[-1][1] <= begin):
            stack.pop()
        if stack and end > stack[-1][1] + 0.002:   # times are told in ns, as decimals of us
            raise AssertionError(f"{name} ends after {stack[-1][2]}, in which it begins")
        around.setdefault(re.sub(r"\d+", "N", name), set()).add(re.sub(r"\d+", "N", stack[-1][2]) if stack else None)
        stack.append((thread, end, name))
    return around


class Profile(TrainCase):
    def numbers(self, run):
        return [(row["step"], row["loss"], row["grad_norm"]) for row in steps_of(run)]

    def test_ranges_nest_and_numbers_stay(self):
        plain, plain_run = self.run_file("plain", MOE, steps=10, micro_batch=4)
        traced, traced_run = self.run_file("traced", MOE, steps=10, micro_batch=4)
        self.upcycle("train", plain)
        file = self.root / "trace.json"
        said = self.upcycle("train", traced, "--profile", file)
        self.assertIn(f"steps 6 to 8 is in {file}", said)
        self.assertEqual(len(self.numbers(plain_run)), 10)
        self.assertEqual(self.numbers(traced_run), self.numbers(plain_run), "a profiler changed the training")
        self.assert_same_files(tiny_run.checkpoint(traced_run, 10), tiny_run.checkpoint(plain_run, 10))

        trace = json.loads(file.read_text())
        ranges = bars(trace, "user_annotation")
        names = [name for *_, name in ranges]
        self.assertEqual([name for name in names if name.startswith("step ")], ["step 6", "step 7", "step 8"])
        for step in (6, 7, 8):   # two micro-batches each, forward and backward
            _, begin, end, _ = next(bar for bar in ranges if bar[3] == f"step {step}")
            inside = [name for _, b, e, name in ranges if begin <= b and e <= end + 0.002]
            for wanted in ("forward of micro-batch 0", "forward of micro-batch 1", "backward of micro-batch 0", "backward of micro-batch 1",
                           "reduce", "optimizer"):
                self.assertEqual(inside.count(wanted), 1, f"{wanted} in step {step}: {inside}")
            self.assertEqual(inside.count("loss"), 2)
            for layer in range(LAYERS):
                self.assertEqual(inside.count(f"layer {layer}"), 2)
        around = parents(ranges)
        forward, backward = "forward of micro-batch N", "backward of micro-batch N"
        for name, wanted in {"step N": {None}, forward: {"step N"}, backward: {"step N"}, "layer N": {forward}, "attention": {"layer N"},
                             "router": {"layer N"}, "experts": {"layer N"}, "embedding": {forward}, "loss": {forward}, "reduce": {"step N"},
                             "optimizer": {"step N"}, "layer N/attention": {backward}, "layer N/experts": {backward}}.items():
            self.assertEqual(around.get(name), wanted, name)
        operations = {name for *_, name in bars(trace, "cpu_op")}
        self.assertTrue({"aten::mm", "aten::_fused_adamw_"} & operations, sorted(operations)[:50])

    def test_full_recompute(self):
        run_file, run = self.run_file("recompute", MOE, steps=4, recompute='"full"')
        file = self.root / "again.json"
        self.assertIn("steps 2 to 4", self.upcycle("train", run_file, "--profile", file))   # fewer steps than the warm-up wants
        around = parents(bars(json.loads(file.read_text()), "user_annotation"))
        self.assertIn("attention", around)
        self.assertEqual(len(steps_of(run)), 4)

    def test_each_rank_has_a_file(self):
        run_file, run = self.run_file("ranks", MOE + "\n[parallel]\nexpert = 2\n", steps=9)
        self.upcycle("train", run_file, "--profile", self.root / "both.json", ranks=2)
        for rank in (0, 1):
            names = [name for *_, name in bars(json.loads((self.root / f"both-rank{rank}.json").read_text()), "user_annotation")]
            self.assertEqual([name for name in names if name.startswith("step ")], ["step 6", "step 7", "step 8"])
        self.assertFalse((self.root / "both.json").exists())

    def test_refused(self):
        run_file, _ = self.run_file("refused", MOE)
        self.refused("train", run_file, "--profile", self.root / "nowhere/trace.json", words=["--profile", "no directory", "nowhere"])
        self.refused("train", run_file, "--profile", self.root, words=["--profile", "is a directory"])
        self.assertIn("--profile FILE", self.upcycle("train", "--help"))


if __name__ == "__main__":
    tiny_run.UPCYCLE = os.path.abspath(sys.argv.pop(1))
    unittest.main()
