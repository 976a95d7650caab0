#!/usr/bin/env python3
"""Drives the batch scripts of slurm/ on a cluster of tools/slurm-lab: run.py UPCYCLE [--short] [--keep] [SCENARIO ...]

Scenarios that leave the nodes alone run at the same time; the others follow. --short: those of CI. --keep leaves the scratch folder."""
import argparse
import io
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path

import cluster
import more_scenarios
import scenarios

# Each inner list at once; one after the other.
SHORT = [["FourNodes", "Stop", "Hang", "Storm", "Array"], ["Preemption"], ["CrashInCheckpoint"]]
FULL = [["FourNodes", "Stop", "Hang", "Array", "ShortLimit"], ["Storm", "Cancelled", "FullDisk", "Switches", "ByHand", "Chain"],
        ["Mpirun", "BadInput", "WrongMpi", "TwoJobs", "Example", "Convert"], ["HangTwice", "NoScontrol", "AbsentRank"], ["Preemption"], ["CrashInCheckpoint"], ["CrashInStep"]]


class Run(threading.Thread):
    """One scenario, with what it had to say."""

    def __init__(self, name):
        super().__init__(name=name)
        self.case = getattr(scenarios, name, None) or getattr(more_scenarios, name)

    def run(self):
        start = time.monotonic()
        words = io.StringIO()
        suite = unittest.defaultTestLoader.loadTestsFromTestCase(self.case)
        self.result = unittest.TextTestRunner(stream=words, verbosity=0).run(suite)
        self.good = self.result.wasSuccessful() and self.result.testsRun > 0
        print(f"{time.monotonic() - start:6.0f} s  {'good  ' if self.good else 'FAILED'}  {self.name}: {' '.join(self.case.__doc__.split())}", flush=True)
        if not self.good:
            print(words.getvalue(), flush=True)
            print("the controller's last lines:", *scenarios.LAB.controller_log()[-25:], sep="\n  ", flush=True)


def tell_of_cores(scratch):
    """A rank that crashes at its start is started again by the scripts, so that no scenario fails: here it is told."""
    for core in scratch.glob("*/core*"):
        print(f"a process crashed: {core}", flush=True)
        if shutil.which("gdb"):
            program = subprocess.run(["gdb", "-batch", "-ex", "info auxv", "-c", core], capture_output=True, text=True).stdout
            executable = re.search(r'AT_EXECFN.*"(.*)"', program)
            words = ["gdb", "-batch", "-ex", "thread apply all bt 25", *([executable[1]] if executable else []), "-c", core]
            print(subprocess.run(words, capture_output=True, text=True).stdout[-8000:], flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("upcycle", type=Path)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("scenarios", nargs="*")
    arguments = parser.parse_intermixed_args()
    groups = SHORT if arguments.short else FULL
    known = {name for group in SHORT + FULL for name in group}
    if unknown := set(arguments.scenarios) - known:
        parser.error(f"no scenario {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    if arguments.scenarios:
        groups = [[name for name in group if name in arguments.scenarios] for group in FULL]

    start = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="upcycle-slurm-"))
    runs = []
    try:
        with cluster.Lab(arguments.upcycle, scratch, accounting=not arguments.short) as lab:
            scenarios.LAB = more_scenarios.LAB = lab
            print(f"{time.monotonic() - start:6.0f} s  the cluster is up", flush=True)
            for group in groups:
                threads = [Run(name) for name in group]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                runs += threads
    finally:
        tell_of_cores(scratch)
        if arguments.keep:
            print(f"kept: {scratch}")
        else:
            shutil.rmtree(scratch, ignore_errors=True)
    bad = [run.name for run in runs if not run.good]
    print(f"{time.monotonic() - start:6.0f} s  {len(runs) - len(bad)} of {len(runs)} scenarios are good" + (f"; failed: {', '.join(bad)}" if bad else ""))
    return 1 if bad or not runs else 0


if __name__ == "__main__":
    sys.exit(main())
