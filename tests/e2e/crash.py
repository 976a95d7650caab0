#!/usr/bin/env python3
"""Kills a program that writes one checkpoint after another (crash_writer.cpp), with SIGKILL, on one rank or on all, over and over: before, inside
and after the calls that create, write, fsync, rename and remove (file_calls.c), and at any moment, in every mode of writing. Each next start, on
another number of ranks and in another mode, must load the step that was published last, bit for bit. Prints how often it was killed where.
Usage: crash.py CRASH_WRITER FILE_CALLS.so [unittest arguments]; CRASH_KILLS=1000 for more, CRASH_SEED=N for others"""
import collections
import os
import random
import signal
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path

import file_calls
from mpi_job import output_of

PROGRAM = None
KILLS = int(os.environ.get("CRASH_KILLS", 208))
SEED = int(os.environ.get("CRASH_SEED", time.time_ns() % 10**6))
LANES = 2      # runs side by side: starting a job is mostly waiting
STEPS = 3      # of one start, if it lives
# When a rank is killed mpirun gives the others two seconds, in which they wait for it on a core each, before it kills them, too. Of so many
# starts one does that; in the others they are killed as soon as it knows.
WITH_GRACE = 4
# Of every 52 kills so many are aimed at each kind of call; the rest comes at any moment.
AIMED = {"create": 7, "write": 13, "fsync": 9, "rename": 9, "remove": 3}
AT_ANY_MOMENT = 11


class Lane:
    """One run directory, and what it must hold."""

    def __init__(self, root, number, kills, usual):
        self.steps, self.announced = root / f"lane-{number}/checkpoints", root / f"lane-{number}/announced"
        self.trace = root / f"lane-{number}/trace"
        self.steps.mkdir(parents=True)
        self.random = random.Random(SEED * 100 + number)
        self.kills, self.killed = kills, 0
        self.expected = {-1}      # the steps of which one must be loaded next; two, when the kill came inside the rename that publishes
        self.histogram = collections.Counter()
        self.modes = collections.Counter()
        self.usual = usual        # (ranks, mode) -> calls of a start that lives, and its seconds; the same for all lanes

    def start(self, ranks, mode, hurt=None, steps=STEPS):
        for file in (self.announced, self.trace):
            file.unlink(missing_ok=True)
        options = ["--mca", "odls_base_sigkill_timeout", "0"] if self.random.randrange(WITH_GRACE) else []
        return file_calls.start(PROGRAM, self.steps, steps, self.announced, mode, ranks=ranks, under=self.steps, trace=self.trace, hurt=hurt,
                                options=options)

    def finish(self, job):
        """Holds what the job loaded against what was published, and notes what it published itself."""
        said = output_of(job, lambda: file_calls.pids_of(self.trace))
        story = f"seed {SEED}, {self.steps}: {self.announced.read_text() if self.announced.exists() else 'nothing announced'}\n{said}"
        announced = [line.split() for line in self.announced.read_text().splitlines()] if self.announced.exists() else []
        loaded = [int(step) for word, *step in announced if word == "loaded" for step in step]
        assert job.returncode not in (2, 3) and "crash_writer:" not in said, f"exit code {job.returncode}, {story}"
        assert not loaded or loaded[0] in self.expected, f"loaded {loaded[0]}, but {self.expected} was published; {story}"
        events = file_calls.read_trace(self.trace)
        if loaded:
            self.expected = set(loaded)
        made = list(events)
        killed = file_calls.killed_at(self.trace)
        if killed and killed.rest.startswith("before"):
            made.remove([event for event in events if (event.rank, event.thread) == (killed.rank, killed.thread)][-1])
        for event in made:
            if event.kind == "rename" and event.path.name.endswith(".partial") and event.path.parent == self.steps:
                step = int(event.path.name.removesuffix(".partial").removeprefix("step-"))
                self.expected = self.expected | {step} if event.begins else {step}
        published = [int(step) for word, *step in announced if word == "published" for step in step]
        assert not published or max(self.expected) >= published[-1], story
        return events, [word for word, *_ in announced], story

    def lives(self, ranks, mode):
        """A start that nobody kills: how many calls it makes."""
        began = time.monotonic()
        job = self.start(ranks, mode)
        events, words, story = self.finish(job)
        assert job.returncode == 0 and words.count("published") == STEPS, story
        self.usual[ranks, mode] = file_calls.counts(events), time.monotonic() - began

    def aims(self, ranks, mode, kind):
        """Kills at a call of that kind, chosen at random among those of a usual start."""
        usual = {rank: count for (rank, of), count in self.usual[ranks, mode][0].items() if of == kind}
        rank = self.random.choice(sorted(usual))
        when = self.random.choice(["before", "middle", "after"] if kind == "write" else ["before", "after"])
        everyone = self.random.random() < 0.4
        job = self.start(ranks, mode, f"{rank} {kind} {self.random.randint(1, usual[rank])} {when}{'-all' if everyone else ''}")
        _, _, story = self.finish(job)
        if job.returncode == 0:
            return   # fewer calls than usual: nothing was in the way, or to be removed
        killed = file_calls.killed_at(self.trace)
        assert killed and (killed.rank, killed.kind) == (rank, kind) and killed.rest.startswith(when), f"not killed where it was meant to: {killed}, {story}"
        self.count(mode, kind, {"before": "before", "middle": "half done", "after": "after"}[when], everyone)

    def at_any_moment(self, ranks, mode):
        job = self.start(ranks, mode)
        while len(file_calls.pids_of(self.trace)) < ranks and job.poll() is None:
            time.sleep(0.002)
        time.sleep(self.random.uniform(0, self.usual[ranks, mode][1]) * 0.6)   # starting and ending mpirun are the rest
        pids = file_calls.pids_of(self.trace)
        everyone = self.random.random() < 0.4
        for pid in pids if everyone else [self.random.choice(pids)]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass   # it was done
        events, words, _ = self.finish(job)
        if job.returncode == 0:
            return
        inside = {file_calls.in_flight(events, rank) for rank in range(ranks)} - {None}
        if inside:
            self.count(mode, sorted(inside, key=file_calls.KINDS.index)[0], "inside", everyone)
        else:
            self.count(mode, "between calls" if "good" in words else "loading or starting", "", everyone)

    def count(self, mode, kind, when, everyone):
        self.killed += 1
        self.modes[mode] += 1
        self.histogram[kind, when, "all ranks" if everyone else "one rank"] += 1

    def work(self):
        plan = [kind for kind, share in AIMED.items() for _ in range(share)] + ["any moment"] * AT_ANY_MOMENT
        while self.killed < self.kills:
            ranks = self.random.choice([2, 2, 3, 4])
            kind, mode = self.random.choice(plan), self.random.choice(file_calls.MODES)
            if (ranks, mode) not in self.usual:
                self.lives(ranks, mode)
            self.at_any_moment(ranks, mode) if kind == "any moment" else self.aims(ranks, mode, kind)
        job = self.start(1, "plain", steps=2)   # and in the end all is in order
        _, words, story = self.finish(job)
        assert job.returncode == 0 and words.count("published") == 2, story
        newest = max(self.expected)
        names = sorted(entry.name for entry in self.steps.iterdir())
        assert names == [f"step-{newest - 1:08d}", f"step-{newest:08d}"], f"left over: {names}"


class Crash(unittest.TestCase):
    def test_kills(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        usual = {}
        lanes = [Lane(Path(scratch.name), number, KILLS // LANES, usual) for number in range(LANES)]
        failures = []

        def work(lane):
            try:
                lane.work()
            except BaseException as failure:   # told by the main thread
                failures.append(failure)
        threads = [threading.Thread(target=work, args=(lane,)) for lane in lanes]
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        histogram, modes = (sum((getattr(lane, name) for lane in lanes), collections.Counter()) for name in ("histogram", "modes"))
        total = sum(histogram.values())
        print(f"\n{total} kills in {time.monotonic() - began:.0f} s, seed {SEED}; the newest step is {[max(lane.expected) for lane in lanes]}")
        rows = sorted({key[:2] for key in histogram}, key=lambda row: (file_calls.KINDS + (row[0],)).index(row[0]))
        print(f"{'where':<22}{'when':<12}{'one rank':>10}{'all ranks':>10}")
        for kind, when in rows:
            print(f"{kind:<22}{when:<12}{histogram[kind, when, 'one rank']:>10}{histogram[kind, when, 'all ranks']:>10}")
        inside = sum(count for (kind, _, _), count in histogram.items() if kind in ("create", "write", "fsync", "rename"))
        print(f"{inside} of {total} at create, write, fsync or rename; {dict(modes)}", flush=True)
        self.assertEqual(sorted(modes), sorted(file_calls.MODES))
        self.assertGreaterEqual(total, KILLS // LANES * LANES)
        self.assertGreaterEqual(2 * inside, total)


if __name__ == "__main__":
    PROGRAM, file_calls.LIBRARY = (os.path.abspath(sys.argv.pop(1)) for _ in range(2))
    unittest.main()
