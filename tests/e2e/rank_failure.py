#!/usr/bin/env python3
"""A rank's failure is an event: killed, stopped, or thrown out of its step, it ends all ranks within run.timeout, is named, and the run
goes on from its newest checkpoint. Under a launcher that helps (mpirun) and under one that does not (mpirun --enable-recovery).
Usage: rank_failure.py UPCYCLE FAIL_ALLOCATIONS.so [unittest arguments]"""
import os
import signal
import socket
import sys
import time
import unittest

import tiny_run
from mpi_job import output_of, running
from tiny_run import MOE, MPIRUN, TrainCase, checkpoint, steps_of

FAIL_ALLOCATIONS = None   # the library of that name; set by the script that is run
TIMEOUT = 10              # seconds


class RankFailure(TrainCase):
    RANKS = 4
    SETTINGS = ["run.device=cpu"]
    recovery = False               # under mpirun --enable-recovery

    def of_rank(self, rank):
        """What mpirun is told about one rank alone."""
        return []

    def command(self, *arguments, ranks=1, program=None):
        if ranks == 1:
            return super().command(*arguments, program=program)
        preload = ["-x", f"LD_PRELOAD={FAIL_ALLOCATIONS}", "-x", f"FAIL_ALLOCATIONS={self.root / 'no_memory'}"]
        line = [*MPIRUN, *(["--enable-recovery"] if self.recovery else [])]
        for rank in range(ranks):
            line += [*([":"] if rank else []), "-np", "1", *preload, *self.of_rank(rank), tiny_run.UPCYCLE, *map(str, arguments)]
        return line

    def pids(self, run):
        """The ranks' processes, from their heartbeats."""
        lines = [(run / f"heartbeat/rank_{rank:05d}").read_text().splitlines() for rank in range(self.RANKS)]
        return [int(dict(line.split(" ", 1) for line in heartbeat)["pid"]) for heartbeat in lines]

    def fails(self, path, run, victim, hurt, words):
        """Hurts one rank of a job that goes on from where the last one ended."""
        job = self.start("train", path, "--set", *self.SETTINGS, f"run.timeout={TIMEOUT}s", run=run, ranks=self.RANKS, after=12)
        pids = self.pids(run)
        before = sorted(entry.name for entry in (run / "checkpoints").glob("step-????????"))
        hurt_at = time.monotonic()
        hurt(pids[victim])
        others = [pid for pid in pids if pid != pids[victim]]
        while any(map(running, others)) and time.monotonic() - hurt_at < 5 * TIMEOUT:
            time.sleep(0.02)
        took = time.monotonic() - hurt_at
        try:
            said = output_of(job, lambda: pids, 60)
        finally:
            job.terminate()
        self.assertNotIn(job.returncode, (0, 75), said)
        for word in words:
            self.assertIn(word.format(rank=victim, host=socket.gethostname(), pid=pids[victim]), said)
        # A rank that lost its launcher while it aborted ends itself; a job that starts sooner is refused.
        alone = time.monotonic()
        while any(map(running, pids)) and time.monotonic() - alone < TIMEOUT:
            time.sleep(0.02)
        self.assertFalse(any(map(running, pids)), f"a process is left over: {said}")
        self.assertIn("good", self.upcycle("verify", run))
        after = sorted(entry.name for entry in (run / "checkpoints").glob("step-????????"))
        self.assertGreaterEqual(after[-1], before[-1], "the newest checkpoint is lost")
        return took, said

    def all_failures(self):
        path, run = self.run_file("run", MOE + "[parallel]\nexpert = 2\n[checkpoint]\nevery = 10\n", steps=1000000)
        for recovery in (False, True):
            self.recovery = recovery
            with self.subTest("killed", recovery=recovery):
                took, _ = self.fails(path, run, 1, lambda pid: os.kill(pid, signal.SIGKILL),
                                     ["ends the job: a process is gone: rank {rank} ({host}, pid {pid}, step "] if recovery else ["rank {rank}"])
                self.assertLess(took, TIMEOUT)
            with self.subTest("an exception", recovery=recovery):
                took, said = self.fails(path, run, 0, lambda pid: (self.root / f"no_memory.{pid}").touch(),
                                        ["upcycle: rank {rank}: ", "memory"])
                self.assertLess(took, TIMEOUT)
                self.assertEqual(said.count("upcycle: rank"), 1, said)
            with self.subTest("stopped", recovery=recovery):
                took, _ = self.fails(path, run, self.RANKS - 1, lambda pid: os.kill(pid, signal.SIGSTOP),
                                     [f"after {TIMEOUT} s without progress (step ", "a process is stopped: rank {rank} ({host}, pid {pid}, step "])
                self.assertLess(took, TIMEOUT + 3)
        done = int(sorted(entry.name for entry in (run / "checkpoints").glob("step-????????"))[-1].removeprefix("step-"))
        self.recovery = False
        self.upcycle("train", path, "--set", *self.SETTINGS, f"train.steps={done + 3}", "--accept-changes", ranks=self.RANKS)
        self.assertEqual(steps_of(run)[-1]["step"], done + 3)
        self.assertTrue(checkpoint(run, done + 3).is_dir())


class OnCpu(RankFailure):
    def test_all(self):
        self.all_failures()


if __name__ == "__main__":
    tiny_run.UPCYCLE = os.path.abspath(sys.argv.pop(1))
    FAIL_ALLOCATIONS = os.path.abspath(sys.argv.pop(1))
    unittest.main()
