"""What of the time in NCCL's kernels computation hides: read from the traces that `upcycle train --profile` writes (Kineto's JSON)."""
import mmap
import re

STEPS = 3   # in a trace of a run of more than 8 steps, after 5 (src/train/step_trace.cpp)


def events(file, categories):
    """(category, name, begin, end) of the complete events, in microseconds. A long run's trace has hundreds of megabytes: they are searched, not
    parsed."""
    pattern = re.compile(rb'"ph": "X", "cat": "(%b)", "name": "((?:[^"\\]|\\.)*)"[^{}]*?"ts": ([0-9.]+), "dur": ([0-9.]+)' % b"|".join(map(str.encode, categories)))
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as text:
        for category, name, begin, seconds in pattern.findall(text):
            yield category.decode(), name.decode(), float(begin), float(begin) + float(seconds)


def union(spans):
    """[(begin, end)], sorted, none touching another."""
    whole = []
    for begin, end in sorted(spans):
        if whole and begin <= whole[-1][1]:
            whole[-1][1] = max(whole[-1][1], end)
        else:
            whole.append([begin, end])
    return whole


def length(spans):
    return sum(end - begin for begin, end in spans)


def shared(one, other):
    """How long both are at work; of two unions."""
    total, i, j = 0.0, 0, 0
    while i < len(one) and j < len(other):
        total += max(0.0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return total


def of_trace(file):
    """Seconds a step of one rank's GPU: `exposed`: in NCCL's kernels (which also wait for the other ranks) while no other kernel runs; `hidden`:
    in them beside others; `idle`: nothing, no copy either; `window`: from its first work to its last. None where there is no kernel."""
    found = [*events(file, ("kernel", "gpu_memcpy", "gpu_memset"))]
    kernels = [(name, begin, end) for category, name, begin, end in found if category == "kernel"]
    if not kernels:
        return None
    nccl = union([(begin, end) for name, begin, end in kernels if name.startswith("nccl")])
    others = union([(begin, end) for name, begin, end in kernels if not name.startswith("nccl")])
    busy = union([(begin, end) for *_, begin, end in found])
    hidden, window = shared(nccl, others), busy[-1][1] - busy[0][0]
    microseconds = {"exposed": length(nccl) - hidden, "hidden": hidden, "idle": window - length(busy), "window": window}
    return {key: value / 1e6 / STEPS for key, value in microseconds.items()}


def of_ranks(files):
    """The mean over ranks, and the largest exposed time of one; None where there is no GPU."""
    each = [of_trace(file) for file in files]
    if None in each:
        return None
    return {key: sum(one[key] for one in each) / len(each) for key in each[0]} | {"exposed_most": max(one["exposed"] for one in each)}
