"""The layouts that tools/bench scaling measures, the work of each, and what of a model one GPU holds."""
import json
import math
from dataclasses import dataclass, field

from benchmarks import accelerator, common
from benchmarks.model_config import config_of

# Of perfect scaling. What several axes share is asked what the lower of them is.
GOALS = {"dp": 0.97, "zero1": 0.97, "ep": 0.95, "tp": 0.86, "pp": 0.92, "pp-interleaved": 0.92, "cp": 0.90, "dp-ep": 0.95, "tp-pp": 0.86}
MARGIN = 0.94   # of a GPU's memory, the most that the plan may fill: LibTorch's allocator has gaps


@dataclass(frozen=True)
class Work:
    """Of a step, whatever the layout."""
    sequence: int
    sequences: int     # of all ranks
    micro_batch: int   # of them, at a time
    recompute: str = "none"

    def words(self):
        return [f"train.sequence={self.sequence}", f"train.global_batch={self.sequences}", f"train.micro_batch={self.micro_batch}",
                f'train.recompute="{self.recompute}"']

    def __str__(self):
        return f"{self.sequences} x {self.sequence}" + (f", {self.micro_batch} at a time" if self.micro_batch != self.sequences else "")


@dataclass(frozen=True)
class Layout:
    key: str
    name: str
    parallel: dict
    work: Work
    alone: Work            # one GPU's, of which this is a multiple
    at_best: float = 1.0   # what the schedule allows, of perfect
    goal: float = field(default=1.0)

    @property
    def kind(self):
        return "strong" if self.work.sequences == self.alone.sequences else "weak"

    def words(self):
        return [*self.work.words(), *(f"parallel.{key}={value}" for key, value in self.parallel.items())]


def flops_of_layer(of, sequence):
    return accelerator.flops_per_token(of | {"layers": 1}, sequence) - head_flops(of)


def head_flops(of):
    return 6 * of["hidden"] * of["vocab"]


def passes(counts, head, stages, micro_batches):
    """The least that a step takes, in passes through one layer: the fullest stage, and once the largest chunk on each other stage, while the
    pipeline fills and empties. The head with the loss is worth `head` layers of the last chunk."""
    loads = [*counts[:-1], counts[-1] + head]
    return micro_batches * max(sum(loads[stage::stages]) for stage in range(stages)) + (stages - 1) * max(loads)


def split(of, head, stages, virtual, micro_batches):
    """Layers of each chunk, so that a step takes least: from an even cut, as long as it helps to move a layer from one chunk to another."""
    chunks = stages * virtual
    counts = [of["layers"] // chunks + (chunk < of["layers"] % chunks) for chunk in range(chunks)]

    def cost(cut):
        return passes(cut, head, stages, micro_batches), sum(load * load for load in [*cut[:-1], cut[-1] + head])

    while True:
        moved = [[count - (chunk == giver) + (chunk == taker) for chunk, count in enumerate(counts)]
                 for giver in range(chunks) for taker in range(chunks) if counts[giver] > 1 and giver != taker]
        best = min(moved, key=cost, default=counts)
        if cost(best) >= cost(counts):
            return counts
        counts = best


def pipeline(of, sequence, stages, virtual, micro_batches):
    """([parallel] of it, the most that the cut into chunks and the bubble allow, of perfect)."""
    keys, head = {"pipeline": stages, "virtual_stages": virtual}, head_flops(of) / flops_of_layer(of, sequence)
    if of["layers"] < stages * virtual:
        return keys, 1.0   # the program will say so
    counts = split(of, head, stages, virtual, micro_batches)
    ideal = micro_batches * (of["layers"] + head) / stages
    return keys | {"layout": "|".join(map(str, counts))}, ideal / passes(counts, head, stages, micro_batches)


def layouts(chosen, of, long_recompute):
    """Weak scaling for the axes that take more sequences at a time: each GPU has what the one GPU had. Strong scaling for those that divide the
    work on the same sequences: layers, widths, positions."""
    n = chosen.ranks
    if n == 1:
        return []
    alone = Work(chosen.sequence, chosen.micro_batch, chosen.micro_batch)
    grown = Work(chosen.sequence, n * chosen.micro_batch, chosen.micro_batch)
    piped = Work(chosen.sequence, chosen.micro_batches, 1)
    paired = Work(chosen.sequence, 2 * chosen.micro_batches, 2)   # tensor ranks halve what a micro-batch takes, and its products
    long = Work(chosen.long_sequence, 1, 1, long_recompute)
    all_of_them = []

    def add(key, name, parallel, work, of_one, at_best=1.0):
        all_of_them.append(Layout(key, name, parallel, work, of_one, at_best, GOALS[key]))

    add("dp", f"DP{n}, ZeRO off", {"zero": 0}, grown, alone)
    add("zero1", f"DP{n}, ZeRO-1", {}, grown, alone)
    if n <= of["experts"]:
        add("ep", f"EP{n}", {"expert": n}, grown, alone)
    add("tp", f"TP{n}", {"tensor": n}, alone, alone)
    for key, name, virtual in (("pp", "1F1B", 1), ("pp-interleaved", "interleaved", 2)):
        parallel, at_best = pipeline(of, chosen.sequence, n, virtual, chosen.micro_batches)
        add(key, f"PP{n}, {name}", parallel, piped, piped, at_best)
    add("cp", f"CP{n}", {"context": n}, long, long)
    if n >= 4:
        expert = min(n // 2, of["experts"])
        add("dp-ep", f"DP{n // expert} x EP{expert}", {"expert": expert}, grown, alone)
        parallel, at_best = pipeline(of, chosen.sequence, n // 2, 1, chosen.micro_batches)
        add("tp-pp", f"TP2 x PP{n // 2}, 1F1B", {"tensor": 2} | parallel, paired, paired, at_best)
    return [layout for layout in all_of_them if layout.key in chosen.only]


def planned(upcycle, folder, of, work):
    """{recompute: bytes of one GPU}, by `upcycle plan`."""
    (folder / "config.json").write_text(json.dumps(config_of(of)))
    run_file = folder / "plan.toml"
    run_file.write_text(f'[source]\narchitecture = "{folder}/config.json"\n[data]\ntrain = "mock"\n')
    said = common.run([upcycle, "plan", run_file, "--ranks", 1, "--json", "--set", *work.words()], common.environment(1)).output
    return {name: entry["largest_rank_bytes"] for name, entry in json.loads(said[said.index("{"):])["by_recompute"].items()}


def layers_that_fit(upcycle, folder, of, work, memory):
    """As many of the model's layers as one GPU of so many bytes holds for `work`."""
    def needed(layers):
        return planned(upcycle, folder, of | {"layers": layers}, work)["none"]

    if needed(of["layers"]) <= MARGIN * memory:
        return of["layers"]
    one, two = needed(1), needed(2)
    layers = math.floor(1 + (MARGIN * memory - one) / (two - one))
    while layers > 0 and needed(layers) > MARGIN * memory:
        layers -= 1
    if layers < 1:
        raise common.Failed(f"one layer needs {one / 2**30:.1f} GiB, more than {MARGIN:.0%} of this GPU's {memory / 2**30:.1f}")
    return layers


def recompute_that_fits(upcycle, folder, of, work, memory):
    """The least that lets one GPU do `work`; the most where nothing does."""
    sizes = planned(upcycle, folder, of, work)
    return next((name for name in ("none", "selective", "full") if sizes[name] <= MARGIN * memory), "full")
