#!/usr/bin/env python3
"""How fast tools/preprocess is beside `tokenizers` alone on the same cores: preprocess_rate.py TEXT.jsonl TOKENIZER [ROUNDS]

`tokenizers` alone: a plain loop of encode_batch_fast, its fastest call (tools/preprocess makes it, too), 1000 texts at a time, over texts
that are in memory already, on all cores, its ids thrown away. tools/preprocess: the whole command, from the start of Python to the files
in their place. The two take turns; wall seconds and CPU seconds (which other jobs on the machine disturb less) of both, and the ratios of
their rates.
"""
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools/preprocess"
ALONE = """
import json, os, sys, time
from tokenizers import Tokenizer
texts = [json.loads(line)["text"] for line in open(sys.argv[1], "rb")]
tokenizer = Tokenizer.from_file(sys.argv[2] + "/tokenizer.json")
before, started, tokens = os.times(), time.monotonic(), 0
for first in range(0, len(texts), 1000):
    tokens += sum(len(encoding.ids) for encoding in tokenizer.encode_batch_fast(texts[first:first + 1000]))
seconds, after = time.monotonic() - started, os.times()
print(tokens + len(texts), seconds, after.user + after.system - before.user - before.system)
"""


def alone(text, tokenizer):
    tokens, wall, cpu = subprocess.run([sys.executable, "-c", ALONE, text, tokenizer], check=True, capture_output=True, text=True).stdout.split()
    return int(tokens), float(wall), float(cpu)


def preprocess(text, tokenizer, *options):
    with tempfile.TemporaryDirectory() as folder:
        before, started = os.times(), time.monotonic()
        said = subprocess.run([sys.executable, str(TOOL), text, "--tokenizer", tokenizer, "--output", f"{folder}/x", *options], check=True,
                              capture_output=True, text=True).stdout
        wall, after = time.monotonic() - started, os.times()
        tokens = int(said.rsplit("x.bin: ", 1)[1].split()[0])
        return tokens, wall, after.children_user + after.children_system - before.children_user - before.children_system


def main():
    text, tokenizer = sys.argv[1:3]
    rounds = [(alone(text, tokenizer), preprocess(text, tokenizer, *sys.argv[4:])) for _ in range(int((sys.argv[3:] or ["3"])[0]))]
    for theirs, ours in rounds:
        assert theirs[0] == ours[0], (theirs, ours)
        print(f"{ours[0]} tokens: tokenizers alone {theirs[1]:.1f} s (CPU {theirs[2]:.1f} s), tools/preprocess {ours[1]:.1f} s "
              f"(CPU {ours[2]:.1f} s): rate {theirs[1] / ours[1]:.2f} of alone (by CPU {theirs[2] / ours[2]:.2f})")
    print(f"median: {statistics.median(t[1] / o[1] for t, o in rounds):.2f} by wall, "
          f"{statistics.median(t[2] / o[2] for t, o in rounds):.2f} by CPU, on {len(os.sched_getaffinity(0))} cores")


if __name__ == "__main__":
    main()
