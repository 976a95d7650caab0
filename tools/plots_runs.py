"""Runs as their metrics.jsonl tells of them, for tools/plots and tools/report: steps, validations, looks at the experts."""
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy

from user_error import UserError


@dataclass
class Run:
    label: str
    steps: dict = field(default_factory=dict)
    validation: dict = field(default_factory=dict)
    looks: dict = field(default_factory=dict)  # at the experts
    resumes: list = field(default_factory=list)  # tokens seen before each start but the first

    def column(self, key):
        """(tokens, values) of the steps that were applied and have a finite value."""
        rows = [(row["tokens"], row[key]) for _, row in sorted(self.steps.items())
                if is_finite(row.get(key)) and not row.get("skipped")]
        return numpy.array(rows, dtype=float).reshape(-1, 2).T

    def loads(self):
        """(tokens, [steps, layers, experts]): each expert's tokens over the layer's mean; None without experts."""
        rows = [(row["tokens"], row["tokens_per_expert"]) for _, row in sorted(self.steps.items())
                if row.get("tokens_per_expert") is not None]
        rows = [(tokens, counts) for tokens, counts in rows if counts.sum(axis=1).min() > 0 and counts.shape == rows[-1][1].shape]
        if not rows:
            return None
        load = numpy.array([counts / counts.mean(axis=1, keepdims=True) for _, counts in rows])
        return numpy.array([tokens for tokens, _ in rows], dtype=float), load

    def look_at(self, key):
        """(tokens, [looks, layers]) of the looks that tell `key`; distances are the mean over a layer's experts. None without any."""
        rows = [(row["tokens"], [mean(value) for value in row[key]]) for _, row in sorted(self.looks.items()) if row.get(key)]
        rows = [(tokens, values) for tokens, values in rows if all(map(is_finite, values)) and len(values) == len(rows[-1][1])]
        return (numpy.array([tokens for tokens, _ in rows], dtype=float), numpy.array([values for _, values in rows])) if rows else None

    def layer_numbers(self, count):
        """The numbers of the layers with experts, where a look has told them."""
        for row in self.looks.values():
            if len(row.get("layers", ())) == count:
                return list(row["layers"])
        return None


def is_finite(value):
    return isinstance(value, (int, float)) and math.isfinite(value)


def mean(value):
    if not isinstance(value, list):
        return value
    known = [one for one in value if is_finite(one)]
    return sum(known) / len(known) if known else None


def read(argument):
    label, _, folder = argument.rpartition("=")
    path = Path(folder) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; name directories of runs")
    try:
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} can't be read: {error}") from None
    run = Run(label)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            take(run, row)
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) and isinstance(error, ValueError):
                continue  # a run that was killed, or is just writing, leaves half a line
            raise UserError(f"{path}, line {number}: not a line of metrics ({type(error).__name__}: {error})") from None
    if not run.steps and not run.validation:
        raise UserError(f"{path}: no step was logged yet")
    run.label = run.label or Path(folder).resolve().name
    return run


def take(run, row):
    """One line of metrics.jsonl. A start or a roll-back takes back what was told of later steps. Throws KeyError and TypeError for what is none."""
    kind = row["kind"]
    if kind in ("start", "rollback"):
        run.label = run.label or row.get("name", "")
        step = row["step"]
        for told in (run.steps, run.validation, run.looks):
            for later in [number for number in told if number > step]:
                del told[later]
        if step > 0 and kind == "start":
            run.resumes.append(row["tokens"] + 0)
    elif kind == "step":
        row["tokens"] + 0
        if row.get("tokens_per_expert") is not None:
            row["tokens_per_expert"] = numpy.array(row["tokens_per_expert"], dtype=numpy.float32)
        run.steps[row["step"]] = row
    elif kind == "validation":
        run.validation[row["step"]] = (row["tokens"] + 0, row["loss"])
    elif kind == "experts":
        row["tokens"] + 0
        run.looks[row["step"]] = row


def refuse_equal_labels(runs, arguments):
    seen = {}
    for run, argument in zip(runs, arguments):
        folder = argument.rpartition("=")[2]
        if run.label in seen:
            raise UserError(f"two runs are called '{run.label}': name them, as in tools/plots 'first={seen[run.label]}' 'second={folder}'")
        seen[run.label] = folder
