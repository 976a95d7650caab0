"""What `upcycle sweep` left in its directory, for tools/report. Losses stay the doubles that metrics.jsonl has."""
import json
import re
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import plots_runs
from plots_runs import is_finite
from user_error import UserError

RECENT = 300  # seconds: a run that wrote something since is running
PER_RUN = ("run.directory", "run.name", "run.seed")  # settings in which the seeds of an arm differ
STEPS = ("train.steps", "optimizer.warmup", "optimizer.decay")  # chosen by the sweep where it matches FLOPs or time


@dataclass(eq=False)
class Run:
    """One arm with one seed."""
    sweep: Path
    name: str
    control: bool
    settings: dict
    seed: int | None
    planned: int  # steps
    parameters: int | None
    active: int | None
    flops_per_token: float | None
    tokens_per_step: float | None
    cannot: str
    log: plots_runs.Run | None = None  # steps and validation by step
    unreadable: int = 0  # lines of metrics.jsonl
    certificate: dict | None = None
    machine: str = ""
    state: str = ""
    why: str = ""

    @property
    def step(self):
        return max([0, *self.log.steps])

    def points(self):
        """[(tokens, validation loss)], without those that are no numbers."""
        return [(tokens, loss) for _, (tokens, loss) in sorted(self.log.validation.items()) if is_finite(loss)]

    def flops_points(self):
        return [(tokens * self.flops_per_token, loss) for tokens, loss in self.points()] if self.flops_per_token else []

    def diverged(self):
        last = self.log.validation.get(max(self.log.validation, default=0))
        return last is not None and not is_finite(last[1])

    def final(self):
        """Validation loss at the end; None before there is any, and where it is no number."""
        return self.points()[-1][1] if self.points() and not self.diverged() else None

    def tokens(self):
        return max([tokens for tokens, _ in self.log.validation.values()] + [row["tokens"] for row in self.log.steps.values()])

    def speed(self):
        """Tokens per second, the median of the steps."""
        rates = self.log.column("tokens_per_second")[1]
        return float(statistics.median(rates)) if len(rates) else None

    def late(self, key):
        """Values in the last tenth of the steps, one at least."""
        values = self.log.column(key)[1]
        return values[-max(1, len(values) // 10):]

    def progress(self):
        words = {"done": "done", "not started": "not started", "cannot run": "cannot run"}
        return words.get(self.state, f"{self.state} at step {self.step} of {self.planned}")


@dataclass(eq=False)
class Arm:
    """The runs of one setting. Those that are done count; while none is, those that got furthest."""
    name: str
    control: bool
    settings: dict
    runs: list
    label: str = ""

    @property
    def finished(self):
        return any(run.state == "done" for run in self.runs)

    @property
    def counted(self):
        begun = [run for run in self.runs if run.points()]
        return [run for run in self.runs if run.state == "done"] or [
            run for run in begun if run.points()[-1][0] == max(other.points()[-1][0] for other in begun)]

    def loss(self):
        """Mean over its runs; None before there is any."""
        losses = self.values(Run.final)
        return statistics.fmean(losses) if losses else None

    def values(self, value):
        return [number for run in self.counted if (number := value(run)) is not None]


def read_metrics(run, path):
    """Steps computed again after a resume replace those before it. A crash leaves half a line, the next start right behind it."""
    run.log = plots_runs.Run(run.name)
    try:
        lines = path.read_text(errors="replace").split("\n") if path.is_file() else []
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            start = line.rfind('{"kind":"start"')
            try:
                row = json.loads(line[start:]) if start > 0 else None
            except ValueError:
                row = None
            run.unreadable += row is None and number < len(lines)
        try:
            if row:
                row.pop("tokens_per_expert", None)  # large, and not looked at here
                plots_runs.take(run.log, row)
        except (KeyError, TypeError, AttributeError):
            run.unreadable += 1


def last_error(log):
    """What the program said when it failed last, and on which machine it ran; an error before a new start is over."""
    said, machine = "", ""
    for line in log.read_text(errors="replace").splitlines() if log.is_file() else []:
        if re.match(r"\d\d:\d\d:\d\d upcycle ", line):
            said = ""
        elif line.startswith(("upcycle: ", "watchdog: ")):
            said = line.split(": ", 1)[1]
        elif found := re.search(r"; \d+ ranks? \(.*?\) on (.+?), tensors", line):
            machine = found[1]
    return said, machine


def settle(run):
    """Says how far the run is, from what lies in its directory and its log."""
    folder = run.sweep / run.name
    read_metrics(run, folder / "metrics.jsonl")
    said, run.machine = last_error(run.sweep / "logs" / f"{run.name}.log")
    for path in sorted(folder.glob("checkpoints/step-*/certificate.json"))[:1]:
        try:
            run.certificate = json.loads(path.read_text())
            run.certificate["verdict"]
        except (OSError, ValueError, KeyError, TypeError):
            run.certificate = {"verdict": "unreadable"}
    touched = [path.stat().st_mtime for path in [folder / "metrics.jsonl", *folder.glob("heartbeat/*")] if path.is_file()]
    validated = max(run.log.validation, default=-1)
    if run.cannot and not run.log.steps:
        run.state, run.why = "cannot run", run.cannot
    elif run.planned and run.step >= run.planned and (validated >= run.planned or validated < 0):
        run.state = "done"
    elif said:
        run.state, run.why = "failed", said
    elif not touched:
        run.state = "not started"
    else:
        run.state = "running" if time.time() - max(touched) < RECENT else "stopped"


def read_sweep(directory):
    """(sweep.json, its runs)."""
    path = directory / "sweep.json"
    if not path.is_file():
        raise UserError(f"{directory}: {'no sweep.json is in it' if directory.is_dir() else 'no such directory'}; "
                      "name what a sweep file has as sweep.directory")
    try:
        content = json.loads(path.read_text())
        content["sweep"], content["base"], content["match"], content["ranks"], content["arms"][0]
        runs = [Run(sweep=directory, name=str(arm["name"]), control=bool(arm["control"]), settings=dict(arm["settings"]),
                    seed=arm.get("seed"), planned=int(arm.get("steps", 0)), parameters=arm.get("parameters"),
                    active=arm.get("active_parameters"), flops_per_token=arm.get("flops_per_token"),
                    tokens_per_step=arm.get("tokens_per_step"), cannot=str(arm.get("cannot", ""))) for arm in content["arms"]]
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}): move it away and run upcycle sweep again, "
                      "which writes it anew; arms that are done stay") from None
    for run in runs:
        settle(run)
    return content, runs
