"""Runs an MPI program with file_calls.c in front of the C library, and reads what it tells."""
import os
import subprocess
from pathlib import Path
from typing import NamedTuple

from rank_server import served

MPIRUN = os.environ.get("UPCYCLE_MPIRUN", "mpirun --oversubscribe --bind-to none --mca mpi_yield_when_idle 1").split()
LIBRARY = None   # file_calls.so; set by the script that is run
MODES = ("plain", "asynchronous", "divided", "buffered", "independent")   # of crash_writer.cpp
KINDS = ("create", "reserve", "write", "fsync", "rename", "remove")


class Event(NamedTuple):
    begins: bool
    rank: int
    thread: int
    kind: str
    path: Path
    rest: str      # begin: bytes of a write, the new path of a rename; end: the result, or minus the errno

    @property
    def succeeds(self):
        return not self.begins and not self.rest.startswith("-")


def start(program, *arguments, ranks, under, trace, hurt=None, options=()):
    """The job in the background, with further `options` of mpirun. Its ranks are children of mpirun, also when there is one rank; but see rank_server.py."""
    told = {"FILE_CALLS_UNDER": under, "FILE_CALLS_TRACE": trace} | ({"FILE_CALLS_HURT": hurt} if hurt else {})
    started = served(program, preload=(LIBRARY,))
    if started == program:
        told["LD_PRELOAD"] = LIBRARY
    exports = [word for key, value in told.items() for word in ("-x", f"{key}={value}")]
    line = [*MPIRUN, *options, "-np", str(ranks), *exports, started, *map(str, arguments)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def pids_of(trace):
    """Of the ranks that have started, in no order."""
    lines = trace.read_text().split("\n")[:-1] if trace.exists() else []
    return [int(line.split("\t")[5]) for line in lines if line.startswith("S\t")]


def read_trace(trace):
    """All calls, in the order in which they happened."""
    return [event for phase, event in lines_of(trace) if phase in "BE"]


def killed_at(trace):
    """The call at which a rank has killed itself, `rest` saying when; None where none has."""
    return next((event for phase, event in lines_of(trace) if phase == "K"), None)


def lines_of(trace):
    for line in trace.read_text().split("\n")[:-1] if trace.exists() else []:
        phase, rank, thread, kind, path, rest = line.split("\t")
        yield phase, Event(phase == "B", int(rank), int(thread), kind, Path(path), rest)


def counts(events):
    """{(rank, kind): calls}"""
    out = {}
    for event in events:
        if event.begins:
            out[event.rank, event.kind] = out.get((event.rank, event.kind), 0) + 1
    return out


def in_flight(events, rank):
    """The kind of the call in which a rank's trace ends; None between calls."""
    begun = {}   # by thread
    for event in events:
        if event.rank == rank:
            begun[event.thread] = event.kind if event.begins else None
    return next((kind for kind in begun.values() if kind), None)
