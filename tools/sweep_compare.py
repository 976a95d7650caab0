"""Sweeps compared, for tools/report: which runs are an arm, its mean and spread over seeds, differences to the dense control."""
import json
import math
import re
import statistics
from dataclasses import dataclass, field

from sweep_data import PER_RUN, STEPS, Arm, Run, read_sweep
from user_error import UserError

# Student's t, 97.5 %, for 1, 2, ... degrees of freedom; after the last, 2.1 is near enough.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
LETTERS = {"moe.experts": "E", "moe.granularity": "G", "moe.top_k": "K"}  # of keys, in labels
WORDS = {"upcycle.scaling": "", "upcycle.router_logit_std": "router std ", "optimizer.router_lr_scale": "router lr ×"}
UNSEEN = ("checkpoint.", "log.")  # sections that change no number


@dataclass
class Sweeps:
    """What the report tells of. Equal tokens and FLOPs: the most that all finished runs have reached; None where there is none."""
    directories: list
    facts: dict  # base, match, ranks, tokens_per_step, ...
    arms: list  # by final loss, the best first; then those that are not finished
    control: Arm | None
    equal_tokens: float | None
    equal_flops: float | None
    notes: list = field(default_factory=list)  # what is missing or odd

    def bar_is_known(self):
        """The control's final loss is there, to be beaten."""
        return bool(self.control and self.control.finished and self.control.loss() is not None)


def interpolate(points, x):
    """Straight lines between the points; None outside of them."""
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= x <= x1 and x0 < x1:
            return y0 if x == x0 else y1 if x == x1 else y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[0][1] if len(points) == 1 and points[0][0] == x else None


def first_below(points, bar):
    """Where straight lines between the points first go below `bar`; None: they do not."""
    before = None
    for x, y in points:
        if y < bar:
            return x if before is None else before[0] + (x - before[0]) * (before[1] - bar) / (before[1] - y)
        before = (x, y)
    return None


def mean_sd(values):
    """(mean, sample standard deviation): None for what so few values do not tell."""
    return (statistics.fmean(values) if values else None, statistics.stdev(values) if len(values) > 1 else None)


def partners(run, other):
    """The other arm's runs to compare with: of the same sweep and seed, else of the same sweep, else all."""
    same = [theirs for theirs in other.counted if theirs.sweep == run.sweep]
    return [theirs for theirs in same if theirs.seed == run.seed] or same or other.counted


def difference(arm, other, value):
    """(mean, sd, n) of an arm's runs minus their partners; where a run has none of its own seed the other's spread counts too."""
    differences, paired = [], True
    for run in arm.counted:
        theirs = [number for partner in partners(run, other) if (number := value(partner)) is not None]
        if (mine := value(run)) is not None and theirs:
            differences.append(mine - statistics.fmean(theirs))
            paired &= all(partner.seed == run.seed for partner in partners(run, other))
    mean, sd = mean_sd(differences)
    others = mean_sd(other.values(value))[1]
    return mean, math.hypot(sd, others) if sd is not None and not paired and others else sd, len(differences)


def reach(sd, n):
    """Half the 95 % confidence interval of a mean over n seeds; None: one seed does not tell."""
    return None if sd is None or n < 2 else (STUDENT[n - 2] if n - 2 < len(STUDENT) else 2.1) * sd / math.sqrt(n)


def is_clear(mean, sd, n):
    """Whether a difference is more than the seeds' spread: zero is outside of the interval. None: one seed does not tell."""
    half = reach(sd, n)
    return None if half is None else abs(mean) > half


def resolved(run):
    """Section.key -> text of the run file that the sweep wrote for an arm; empty without it."""
    path, section, out = run.sweep / f"{run.name}.toml", "", {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        if found := re.match(r"\[(\w+)\]", line):
            section = found[1]
        elif found := re.match(r"(\w+) = (.*?)(\s+#.*)?$", line):
            out[f"{section}.{found[1]}"] = found[2]
    return out


def identity(content, runs):
    """What sweeps must have in common to be put side by side."""
    out = {"base": content["base"], "match": content["match"]}
    controls = [run for run in runs if run.control]
    for run in (controls or runs)[:1]:
        out |= {"tokens per step": run.tokens_per_step, "control": "yes" if controls else "no"}
        if controls:
            out |= {key: value for key, value in run.settings.items()
                    if key not in PER_RUN and not key.startswith((*UNSEEN, "parallel."))}
            out |= {"parameters of the control": run.parameters, "FLOPs per token of the control": run.flops_per_token}
        whole = resolved(run)
        sections = ("source.", "data.", "train.", "optimizer.", "validate.") if controls else ("source.", "data.", "validate.")
        # data.seed is among the settings where all seeds see the same batches; elsewhere it goes with the seed.
        out |= {key: value for key, value in whole.items() if key.startswith(sections) and key != "data.seed" and key not in out}
    return out


def refuse_strangers(read, directories):
    first, *others = [identity(content, runs) for content, runs in read]
    for other, directory in zip(others, directories[1:]):
        differ = [f"{key} is {first[key]} in {directories[0]} and {other[key]} in {directory}" for key in first
                  if key in other and first[key] != other[key]]
        if differ:
            raise UserError("these sweeps can't be compared: " + "; ".join(differ))


def key_of(run, match):
    """The same for the seeds of an arm."""
    hidden = PER_RUN + (STEPS if match != "tokens" else ())
    own = {} if run.control else run.settings
    seen = {key: value for key, value in own.items() if key not in hidden and not key.startswith(UNSEEN)}
    return json.dumps(seen, sort_keys=True)


def without_copies(runs, notes):
    """Of runs of one arm with one seed in several sweeps: those that got furthest; equal ones once."""
    kept = []
    for seed in dict.fromkeys(run.seed for run in runs):
        same = [run for run in runs if run.seed == seed]
        for rank in (lambda run: run.state == "done", lambda run: bool(run.points()), lambda run: run.state != "not started"):
            same = [run for run in same if rank(run)] or same
        unlike = []
        for run in same:
            if not any(other.log.validation == run.log.validation for other in unlike):
                unlike.append(run)
        if len(unlike) > 1:
            where = ", ".join(str(run.sweep) for run in unlike)
            notes.append(f"{unlike[0].name} was run {len(unlike)} times, in {where}: each counts.")
        kept += unlike
    return kept


def label_arms(arms, match):
    """Names what tells the arms apart, short: "E8 G4 K8 noise 0.1". Returns the keys in which they differ, those in labels first, and
    sentences on the others: keys that only ever change together with one that is in the labels."""
    others = [arm for arm in arms if not arm.control]
    hidden = PER_RUN + ("data.seed",) + (STEPS if match != "tokens" else ())
    values = {key: [json.dumps(arm.settings.get(key)) for arm in (others if len(others) > 1 else arms)]
              for key in dict.fromkeys(key for arm in others for key in arm.settings) if key not in hidden}
    varying = sorted((key for key in values if len(set(values[key])) > 1), key=lambda key: key not in LETTERS)
    shown, together = [], []
    for key in varying:
        twin = next((one for one in shown if one not in LETTERS and len(set(zip(values[one], values[key]))) == len(set(values[one]))
                     == len(set(values[key]))), None)
        if twin is None or key in LETTERS:
            shown.append(key)
        else:
            pairs = ", ".join(f"{mine} with {theirs}" for mine, theirs in dict.fromkeys(zip(values[key], values[twin])))
            together.append(f"{key} goes with {twin}: {pairs}")
    for arm in arms:
        words = []
        for key in shown if not arm.control else ():
            if key in arm.settings:
                value = arm.settings[key]
                value = value if isinstance(value, str) else json.dumps(value)
                words.append(LETTERS.get(key, WORDS.get(key, key.split(".")[-1] + " ")) + value)
        arm.label = "dense" if arm.control else " ".join(words) or arm.name
    twice = [arm.label for arm in arms]
    for arm in arms:
        if twice.count(arm.label) > 1:
            arm.label = arm.name
    return shown + [key for key in varying if key not in shown], together


def compare(directories):
    """Reads the sweeps in `directories`, checks that they belong together and puts their arms in order."""
    read = [read_sweep(directory) for directory in directories]
    refuse_strangers(read, directories)
    content, match, notes = read[0][0], read[0][0]["match"], []
    groups = {}
    for _, runs in read:
        for run in runs:
            groups.setdefault((run.control, key_of(run, match)), []).append(run)
    arms = [Arm(re.sub(r"_seed-\d+$", "", runs[0].name), control, runs[0].settings, without_copies(runs, notes))
            for (control, _), runs in groups.items()]
    varying, together = label_arms(arms, match)
    everyone = [run for arm in arms for run in arm.runs]
    if not any(run.points() for run in everyone):
        states = [f"{sum(run.state == state for run in everyone)} {state}" for state in dict.fromkeys(run.state for run in everyone)]
        raise UserError(f"{', '.join(map(str, directories))}: no arm has a validation loss yet ({', '.join(states)}). "
                      "Run the sweep, with validate.every above 0")
    basis = [run for run in everyone if run.state == "done" and run.final() is not None]
    basis = basis or [run for run in everyone if run.points() and run.points()[-1][0] > 0]
    ends = [run.points()[-1][0] for run in basis]
    flops = [run.flops_points()[-1][0] for run in basis if run.flops_per_token]
    arms.sort(key=lambda arm: (not arm.finished, arm.loss() is None, arm.loss() or 0))
    constant = {key: value for key, value in arms[0].settings.items()
                if key not in PER_RUN and all(arm.settings.get(key) == value for arm in arms)}
    facts = {"sweeps": list(dict.fromkeys(one["sweep"] for one, _ in read)), "base": content["base"], "match": match,
             "ranks": sorted({one["ranks"] for one, _ in read}),
             "seeds": sorted({run.seed for run in everyone if run.seed is not None}),
             "tokens_per_step": sorted({run.tokens_per_step for run in everyone if run.tokens_per_step}), "constant": constant,
             "varying": varying, "together": together, "machines": sorted({run.machine for run in everyone if run.machine})}
    control = next((arm for arm in arms if arm.control), None)
    notes += missing(arms, control)
    return Sweeps(directories, facts, arms, control, min(ends, default=None), min(flops, default=None), notes)


def missing(arms, control):
    out = []
    if control is None:
        out.append("There is no dense control: the arms are compared with one another only.")
    elif not control.values(Run.final):
        out.append("The dense control has no validation loss yet: no arm can be compared with it.")
    for arm in arms:
        for run in arm.runs:
            name = arm.label + (f", seed {run.seed}" if len(arm.runs) > 1 else "")
            if run.state != "done":
                out.append(f"{name}: {run.progress()}{': ' + run.why if run.why else ''}.")
            if run.diverged():
                out.append(f"{name}: its validation loss is not a number at step {max(run.log.validation)}; it has no final loss.")
            if run.unreadable:
                out.append(f"{name}: lines of its metrics.jsonl that can't be read were left out: {run.unreadable}.")
            if run.log.steps and not run.log.validation:
                out.append(f"{name}: it has no validation loss (validate.every = 0?).")
            if run.log.steps and not arm.control and run.certificate is None:
                out.append(f"{name}: no certificate is in its checkpoints.")
    return out


def row_of(arm, sweeps):
    """The arm's line of arms.csv, and of the page's tables. None: not known."""
    one = arm.runs[0]
    out = {"arm": arm.name, "label": arm.label, "control": arm.control, "finished": arm.finished}
    out |= {"seeds": " ".join(str(run.seed) for run in arm.runs if run.seed is not None), "parameters": one.parameters,
            "active_parameters": one.active, "flops_per_token": one.flops_per_token}
    out["steps"] = mean_sd([run.step for run in arm.counted])[0]
    out["tokens"] = mean_sd([run.tokens() for run in arm.counted])[0]
    measures = {"final": Run.final}
    if sweeps.equal_tokens is not None:
        measures["equal_tokens"] = lambda run: interpolate(run.points(), sweeps.equal_tokens)
    if sweeps.equal_flops is not None:
        measures["equal_flops"] = lambda run: interpolate(run.flops_points(), sweeps.equal_flops)
    measures["start"] = lambda run: run.log.validation.get(0, (0, None))[1]
    for name in ("final", "equal_tokens", "equal_flops", "start"):
        value = measures.get(name, lambda run: None)
        values = arm.values(value)
        out[f"{name}_loss"], out[f"{name}_sd"] = mean_sd(values)
        out[f"{name}_n"] = len(values)
        # Ends compare only where both are ends.
        apart = sweeps.control and not arm.control and (name != "final" or arm.finished and sweeps.control.finished)
        compared = difference(arm, sweeps.control, value) if apart else (None, None, 0)
        out[f"{name}_difference"], out[f"{name}_difference_sd"] = compared[:2]
    out["at_tokens"], out["at_flops"] = sweeps.equal_tokens, sweeps.equal_flops
    beaten = []
    if sweeps.bar_is_known() and not arm.control:
        for run in arm.counted:
            bars = [loss for partner in partners(run, sweeps.control) if (loss := partner.final()) is not None]
            beaten.append(first_below(run.points(), statistics.fmean(bars)) if bars else None)
    reached = [tokens for tokens in beaten if tokens is not None]
    out["tokens_to_beat_control"], out["seeds_that_beat_control"] = mean_sd(reached)[0], len(reached)
    out["tokens_per_second"] = mean_sd(arm.values(Run.speed))[0]
    out["seconds"] = mean_sd([sum(v) for run in arm.counted if len(v := run.log.column("seconds")[1])])[0]
    out["fullest_over_mean"] = mean_sd([float(v.mean()) for run in arm.counted if len(v := run.late("load_max_over_mean"))])[0]
    out["dead_experts"] = max([int(v.max()) for run in arm.counted if len(v := run.late("dead_experts"))], default=None)
    out["certificate"] = verdict_of(arm)
    out["state"] = "; ".join(f"{count} of {len(arm.runs)} {state}" if len(arm.runs) > 1 and count < len(arm.runs) else state
                             for state, count in counted([run.progress() for run in arm.runs]).items())
    return out


def counted(words):
    return {word: words.count(word) for word in dict.fromkeys(words)}


def verdict_of(arm):
    told = [run.certificate["verdict"] + (f" ({run.certificate['expected']})" if run.certificate.get("expected") else "")
            for run in arm.runs if run.certificate]
    if not told:
        return None
    return "; ".join(word if count == len(told) else f"{count} of {len(told)} {word}" for word, count in counted(told).items())


def validation_rows(sweeps):
    for arm in sweeps.arms:
        for run in arm.runs:
            for step, (tokens, loss) in sorted(run.log.validation.items()):
                flops = tokens * run.flops_per_token if run.flops_per_token else None
                yield {"arm": arm.name, "seed": run.seed, "step": step, "tokens": tokens, "flops": flops, "loss": loss,
                       "sweep": run.sweep}
