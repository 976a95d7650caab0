#!/usr/bin/env python3
"""The order in which a save makes its files durable, which no kill can test: read from a trace of its system calls. And a disk that is full, fails,
or takes less than it was given, at any of these calls.
Usage: file_order.py UPCYCLE CRASH_WRITER FILE_CALLS.so [unittest arguments]"""
import concurrent.futures
import errno
import hashlib
import os
import sys
import unittest

import file_calls
import tiny_run
from mpi_job import output_of
from tiny_run import MOE, TrainCase, checkpoint

WRITER = None


def files_in(folder):
    """Digests of what is in them: of bytes unittest makes a diff for minutes."""
    return {path.relative_to(folder): hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.rglob("*") if path.is_file()}


class Run:
    """A run directory of its own, for crash_writer in one mode."""

    def __init__(self, root, mode):
        run, self.mode = root / mode, mode
        self.steps, self.announced, self.trace = run / "checkpoints", run / "announced", root / f"{mode}.trace"
        run.mkdir()

    def save(self, steps=1, ranks=2, hurt=None, expect=0, announcements=False):
        """What the job says, and its calls on checkpoints; and those on the file of announcements, too."""
        self.trace.unlink(missing_ok=True)
        job = file_calls.start(WRITER, self.steps, steps, self.announced, self.mode, ranks=ranks,
                               under=self.steps.parent if announcements else self.steps, trace=self.trace, hurt=hurt)
        said = output_of(job, lambda: file_calls.pids_of(self.trace))
        assert job.returncode == expect, f"{self.mode}, {hurt}: exit code {job.returncode}\n{said}"
        return said, file_calls.read_trace(self.trace)


class Order(TrainCase):
    def after(self, events, place, kind, path, rank=None):
        """Where the first call of that kind on `path` that begins after `place` ends well."""
        for begin in range(place + 1, len(events)):
            event = events[begin]
            if event.begins and (event.kind, event.path) == (kind, path) and rank in (None, event.rank):
                for end in range(begin + 1, len(events)):
                    if events[end] == event._replace(begins=False, rest=events[end].rest):
                        self.assertTrue(events[end].succeeds, events[end])
                        return end
        self.fail(f"rank {rank}: no {kind} of {path} after {events[place]}")

    def last(self, events, wanted):
        """The place of the last event that is `wanted`."""
        return max(i for i, event in enumerate(events) if wanted(event))

    def test_a_save(self):
        for mode in file_calls.MODES:
            with self.subTest(mode):
                self.in_order(Run(self.root, mode))

    def in_order(self, run):
        run.save(steps=2)
        _, events = run.save(steps=1, announcements=True)
        partial, final = run.steps / "step-00000002.partial", run.steps / "step-00000002"
        publish = [i for i, e in enumerate(events) if e.begins and e.kind == "rename" and e.path == partial]
        self.assertEqual([events[i].rest for i in publish], [str(final)])
        publish = publish[0]
        inside = [e for e in events[:publish] if partial in e.path.parents]

        # 1. What a rank wrote it makes durable itself, after its last write and before the rename.
        written = {(e.rank, e.path) for e in inside if e.kind == "write"}
        self.assertEqual({rank for rank, _ in written}, {0, 1}, "both ranks write")
        self.assertGreaterEqual(len({path for _, path in written}), 6)   # three of tensors, two of text, the manifest
        for rank, path in written:
            wrote = self.last(events, lambda e: (e.rank, e.kind, e.path) == (rank, "write", path))
            self.assertLess(wrote, publish, f"{path} is written to after it was published")
            self.assertLess(self.after(events, wrote, "fsync", path, rank), publish)

        # 2. So are the entries of every directory in which something was made or renamed, the partial folder's own among them.
        made_in = {e.path.parent for e in inside if e.kind == "create"} | {e.path.parent for e in inside if e.kind == "rename"}
        self.assertEqual(made_in, {partial, partial / "tokenizer"})
        for folder in made_in:
            made = self.last(events[:publish], lambda e: e.kind in ("create", "rename") and e.path.parent == folder)
            self.assertLess(self.after(events, made, "fsync", folder), publish)

        # 3. The new name is durable before anybody is told, and before an older step goes.
        published = self.after(events, publish - 1, "rename", partial)
        durable = self.after(events, published, "fsync", run.steps)
        told = [i for i, e in enumerate(events) if e.path == run.announced and e.kind == "write" and i > publish]
        self.assertLess(durable, told[0])
        removals = [i for i, e in enumerate(events)
                    if (e.kind == "remove" and partial not in e.path.parents) or (e.kind == "rename" and e.rest.endswith(".removed"))]
        self.assertGreater(len(removals), 5)
        self.assertLess(durable, removals[0])
        self.assertFalse([e for e in events[publish:] if e.kind == "write" and final in e.path.parents])

    def test_the_first_save_of_a_run(self):
        """The directory of checkpoints is there for good before the first of them is published in it."""
        path, run = self.run_file("run", steps=1)
        steps, trace = run / "checkpoints", self.root / "trace"
        job = file_calls.start(tiny_run.UPCYCLE, "train", path, ranks=2, under=self.root, trace=trace)
        self.assertEqual(job.wait(300), 0, job.stdout.read())
        job.stdout.close()
        events = file_calls.read_trace(trace)
        made = self.last(events, lambda e: e.kind == "create" and e.path == steps and e.succeeds)
        publish = min(i for i, e in enumerate(events) if e.begins and e.kind == "rename" and e.path == steps / "step-00000000.partial")
        self.assertLess(self.after(events, made, "fsync", run), publish)
        made = self.last(events, lambda e: e.kind == "create" and e.path == run and e.succeeds)
        self.assertLess(self.after(events, made, "fsync", run.parent), publish, "so is the run's own")


class Faults(TrainCase):
    def numbers(self, events, rank, kind):
        """Of the calls of a kind that are to fail: the first, one further on, the last, and the first one of weights.h5 itself, which is the index
        where there are several files. What MPI-IO tries out and does without is no call of ours."""
        calls = [event.path.name for event in events if event.begins and (event.rank, event.kind) == (rank, kind)]
        ours = [number for number, name in enumerate(calls, 1) if ".locktest." not in name]
        first = [number for number in ours if calls[number - 1] == "weights.h5"][:1]
        return sorted({*ours[:1], *ours[len(ours) // 2:][:1], *ours[-1:], *first})

    def test_full_and_failing_disks(self):
        """Every kind of call on every rank fails. The modes take turns: mpirun waits for a second when a rank has failed."""
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(self.of_mode, file_calls.MODES))

    def of_mode(self, mode):
        run = Run(self.root, mode)
        run.save(steps=2)
        _, events = run.save(steps=1)
        publish = max(i for i, e in enumerate(events) if e.kind == "rename" and e.path == run.steps / "step-00000002.partial")
        kept = files_in(run.steps)
        for kind, code in (("create", errno.ENOSPC), ("reserve", errno.ENOSPC), ("write", errno.ENOSPC), ("fsync", errno.EIO), ("rename", errno.EDQUOT)):
            for rank in (0, 1):
                for number in self.numbers(events[:publish + 1], rank, kind):
                    hurt = f"{rank} {kind} {number} {code}"
                    said, _ = run.save(hurt=hurt, expect=2)
                    story = f"{mode}, {hurt}: {said}"
                    self.assertEqual(said.count("crash_writer: "), 1, story)
                    self.assertIn(".partial", said, story)
                    self.assertRegex(said, os.strerror(code) + ("|a full disk, a quota" if mode == "independent" else ""), story)   # MPI-IO does not say why
                    self.assertRegex(said, r"\(.*choose another directory.*\)", f"and what to do; {story}")
                    self.assertEqual(files_in(run.steps), kept, f"an earlier checkpoint was touched, or something is left over; {story}")
        run.save(steps=1)   # nothing is lost, and it goes on
        self.assertEqual(sorted(path.name for path in run.steps.iterdir()), ["step-00000002", "step-00000003"])

    def test_short_writes_are_completed(self):
        run = Run(self.root, "plain")
        _, events = run.save(steps=2, hurt="-1 write 1 short")
        begun = {}
        short = set()
        for event in events:
            if event.kind == "write" and event.begins:
                begun[event.rank, event.thread] = int(event.rest)
            elif event.kind == "write" and event.succeeds and int(event.rest) < begun[event.rank, event.thread]:
                short.add((event.rank, event.path.name))
        self.assertTrue({(0, "weights.h5"), (1, "weights.h5"), (1, "exp_avg.h5")} <= short, short)
        run.save(steps=0)   # loads, and holds every bit against what was meant

    def test_of_the_trainer(self):
        """The program itself: the message, exit code 2, the step before as it was, and the run goes on."""
        for asynchronous in ("false", "true"):
            with self.subTest(asynchronous=asynchronous):
                self.of_the_trainer(asynchronous)

    def of_the_trainer(self, asynchronous):
        path, run = self.run_file(f"asynchronous-{asynchronous}", MOE + f"[parallel]\nexpert = 2\n[checkpoint]\nevery = 3\nasynchronous = {asynchronous}\n", steps=3)
        self.upcycle("train", path, ranks=2)
        kept, trace = files_in(run / "checkpoints"), self.root / "trace"

        def train(hurt, expect=2):
            trace.unlink(missing_ok=True)
            job = file_calls.start(tiny_run.UPCYCLE, "train", path, "--set", "train.steps=6", "--accept-changes", ranks=2,
                                   under=run / "checkpoints", trace=trace, hurt=hurt)
            said = output_of(job, lambda: file_calls.pids_of(trace))
            self.assertEqual(job.returncode, expect, said)
            return said
        for hurt in (f"0 reserve 3 {errno.ENOSPC}", f"1 write 2 {errno.ENOSPC}", f"1 fsync 1 {errno.EIO}"):
            with self.subTest(hurt):
                said = train(hurt)
                self.assertEqual(said.count("upcycle: "), 1, said)
                self.assertIn("step-00000006.partial/", said)
                self.assertIn(os.strerror(int(hurt.split()[-1])), said)
                self.assertEqual(files_in(run / "checkpoints"), kept)
        train(None, expect=0)
        self.assertTrue(checkpoint(run, 6).is_dir())


if __name__ == "__main__":
    tiny_run.UPCYCLE, WRITER, file_calls.LIBRARY = (os.path.abspath(sys.argv.pop(1)) for _ in range(3))
    unittest.main()
