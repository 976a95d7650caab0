"""tools/bench scaling: what each axis of the mesh brings on the GPUs of one machine, beside one of them in the same run.

Every layout resumes the same stored step 0 (random weights, random tokens, bf16 with fp32 masters, clipping). DP, ZeRO-1 and EP scale weakly: a
GPU gets as many sequences as the one GPU had. TP, PP and CP scale strongly: they divide the same sequences' work. "Of perfect" is the rate over
that of one GPU, of the same micro-batches, times the number of GPUs. Losses and gradient norms of the first 3 steps are held against one GPU's
with the same sequences. Beside it: what Communicator moves and NCCL moves itself, and how long it takes until anything can move.

Each layout is started twice, the second time for its trace (--no-traces); --only chooses; the last line tells what took how long. Where one GPU
does not hold the model, as many layers are taken as `upcycle plan` allows, or one less if pipelines are cut more evenly then; for the long
sequences less is kept for backward instead. Both are told above the table.

Ranks that share a GPU (--share-gpu) and CPUs (--device cpu --model tiny) are for trying this script."""
import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks import accelerator, common, jobs, layouts, overlap, scaling_tables, step

COMPARED = 3                              # steps whose losses are compared
LOSS_BOUND, NORM_BOUND = 5e-4, 2e-2       # relative; bf16 layouts differ by rounding
PARTS = ("start-up", "collectives", *layouts.GOALS)
JOB_SECONDS = 240


def options(words):
    parser = argparse.ArgumentParser(prog="tools/bench scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="every single number, and the machine's description; written after each layout")
    parser.add_argument("--gpus", type=int, metavar="N", help="ranks, one a GPU (default: all of the machine's; 2 with --share-gpu or on a CPU)")
    parser.add_argument("--only", default=",".join(PARTS), metavar="PART,...", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--model", choices=accelerator.MODELS, default="1.7b-e4", metavar="NAME", help=f"of {', '.join(accelerator.MODELS)} (default: 1.7b-e4)")
    parser.add_argument("--layers", type=int, metavar="N", help="of its layers (default: as many as one GPU holds)")
    parser.add_argument("--sequence", type=int, default=4096, metavar="N", help="default: 4096")
    parser.add_argument("--long-sequence", type=int, default=32768, metavar="N", help="of CP (default: 32768)")
    parser.add_argument("--micro-batch", type=int, default=4, metavar="N", help="sequences of a GPU at a time, but for PP and CP (default: 4)")
    parser.add_argument("--micro-batches", type=int, default=32, metavar="N", help="of PP, one sequence each, with TP two (default: 32)")
    parser.add_argument("--steps", type=int, default=8, metavar="N", help="measured steps; of PP half as many (default: 8)")
    parser.add_argument("--warm-up", type=int, default=3, metavar="N", help="steps before them (default: 3)")
    parser.add_argument("--sizes", metavar="MIB,...", help="of the collectives (default: 1,16,128,1024; without GPUs of their own 1,16)")
    parser.add_argument("--no-traces", action="store_true", help="no exposed communication times, for each of which the layout is run once more")
    parser.add_argument("--keep-traces", type=Path, metavar="DIR", help="the traces, for ui.perfetto.dev")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further keys of all run files")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--share-gpu", action="store_true", help="all ranks on one GPU")
    parser.add_argument("--upcycle", type=Path, metavar="PROGRAM", help="default: the bundle's, or build/cuda/upcycle")
    parser.add_argument("--collectives", type=Path, metavar="PROGRAM", help="default: the bundle's, or build/cuda/collectives")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR", help="where the model lies, twice (1.7b: 20 GB), and traces")
    chosen = parser.parse_args(words)
    chosen.only = chosen.only.split(",")
    for name in chosen.only:
        if name not in PARTS:
            parser.error(f"--only: no {name}; there are {', '.join(PARTS)}")
    for name in ("gpus", "layers", "sequence", "long_sequence", "micro_batch", "micro_batches", "steps", "warm_up"):
        if getattr(chosen, name) is not None and getattr(chosen, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    alone = chosen.device == "cpu" or chosen.share_gpu
    try:
        chosen.sizes = [int(float(size) * 2**20) for size in (chosen.sizes or ("1,16" if alone else "1,16,128,1024")).split(",")]
    except ValueError:
        parser.error(f"--sizes: no list of MiB: {chosen.sizes}")
    chosen.ranks = chosen.gpus or (2 if alone else gpus_here())
    chosen.real = not alone   # figures mean something
    return chosen


def gpus_here():
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return len([word for word in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if word])
    try:
        return len([line for line in subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30).stdout.splitlines() if line.startswith("GPU")])
    except (OSError, subprocess.TimeoutExpired):
        return 0


class Scaling:
    """One run of all; `told` is what --json gets."""
    def __init__(self, chosen, upcycle, collectives, told):
        self.chosen, self.upcycle, self.collectives, self.told = chosen, upcycle, collectives, told
        self.losses, self.alone, self.took = {}, {}, told.setdefault("took_seconds", {})

    def save(self):
        if self.chosen.json:
            self.chosen.json.write_text(json.dumps(self.told, indent=1) + "\n")

    def timed(self, name, measure):
        begin = time.monotonic()
        try:
            return measure()
        finally:
            self.took[name] = round(self.took.get(name, 0) + time.monotonic() - begin, 1)
            self.save()

    def guarded(self, name, measure):
        """What can't be measured is a line."""
        try:
            return self.timed(name, measure)
        except (common.Failed, OSError) as error:
            common.say(str(error))
            return {"failed": jobs.why(error)}

    def start_up(self):
        """Three times; the first may read the libraries from the disk."""
        chosen, tries = self.chosen, []
        for _ in range(3):
            said = jobs.finish(jobs.command(chosen.ranks, chosen.share_gpu, self.collectives, "start-up", chosen.device),
                               jobs.environment(chosen.ranks, chosen.share_gpu) | {"LAUNCHED": f"{time.time():.6f}"}, JOB_SECONDS)
            tries.append(next(json.loads(line) for line in said.splitlines() if line.startswith("{")))
        middle = sorted(tries, key=lambda one: one["start_up"]["all"])[1]
        parts = middle["start_up"]
        return middle | {"mpi_and_nccl": parts["mpi"] + parts["communicators"] + parts["first_use"], "tries": tries}

    def moved(self, words, env):
        said = jobs.finish(words, env, JOB_SECONDS)
        return [json.loads(line) for line in said.splitlines() if line.startswith("{")]

    def bandwidths(self):
        chosen = self.chosen
        env = jobs.environment(chosen.ranks, chosen.share_gpu)
        ours = self.moved(jobs.command(chosen.ranks, chosen.share_gpu, self.collectives, "bandwidth", chosen.device, *chosen.sizes), env)
        peer = env | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(jobs.free_port())}
        theirs, failed = [], {}
        try:
            theirs = self.moved(jobs.command(chosen.ranks, chosen.share_gpu, accelerator.python(), accelerator.PEERS / "collectives_peer.py", chosen.device,
                                             *chosen.sizes), peer)
        except common.Failed as error:
            common.say(str(error))
            failed = {"peer_failed": jobs.why(error)}
        beside = {(line["operation"], line["dtype"], line["bytes"]): line for line in theirs}
        return {"lines": [line | {"peer": beside.get((line["operation"], line["dtype"], line["bytes"]), {})} for line in ours]} | failed

    def prepare(self, folder):
        """The model that one GPU holds, and its step 0."""
        chosen, memory = self.chosen, math.inf
        of = accelerator.shape(chosen.model)
        if chosen.device == "cuda":
            memory = int(self.told["gpu"]["memory_mib"]) * 2**20 / (chosen.ranks if chosen.share_gpu else 1)
        fits = chosen.layers or layouts.layers_that_fit(self.upcycle, folder, of, layouts.Work(chosen.sequence, chosen.micro_batch, chosen.micro_batch), memory)
        # Where it is not the whole model: of two numbers of layers the one that pipelines can be cut into more evenly.
        candidates = [fits, fits - 1] if fits < of["layers"] and not chosen.layers and fits > 1 else [min(fits, of["layers"])]
        of["layers"] = max(candidates, key=lambda layers: sum(layout.at_best for layout in layouts.layouts(chosen, of | {"layers": layers}, "none")))
        recompute = layouts.recompute_that_fits(self.upcycle, folder, of, layouts.Work(chosen.long_sequence, 1, 1), memory)
        self.told |= {"shape": of, "long_recompute": recompute}
        step.random_tokens(folder, of["vocab"], max(chosen.ranks * chosen.micro_batch, chosen.micro_batches) * (chosen.warm_up + chosen.steps), chosen.sequence)
        # One run file for all: conversion takes the keys of the first row.
        run_file, _ = step.prepare_ours(argparse.Namespace(device=chosen.device, sequence=chosen.sequence, micro_batch=chosen.micro_batch, set=chosen.set), of,
                                        folder, self.upcycle)
        return of, recompute, run_file

    def train(self, folder, ranks, words, wanted, further=()):
        chosen = self.chosen
        transport = ['run.transport="nccl"'] if ranks > 1 and chosen.device == "cuda" else []   # what falls back to MPI is no figure
        shares = ["run.share_gpu=true"] if chosen.share_gpu and ranks > 1 else []
        command = jobs.command(ranks, chosen.share_gpu, self.upcycle, "train", folder / "run.toml", "--accept-changes", *further, "--set", *words, *transport, *shares,
                               *chosen.set)
        return step.train(command, jobs.environment(ranks, chosen.share_gpu), folder, wanted)

    def measure(self, folder, ranks, words, work, measured):
        """Rates follow from the median step alone."""
        warm_up = max(self.chosen.warm_up, COMPARED - measured)
        with accelerator.Watch() as watch:
            rows, start = self.train(folder, ranks, words, warm_up + measured)
        if any(row["skipped"] or not math.isfinite(row["loss"] or math.nan) or not row["grad_norm"] > 0 for row in rows):
            raise common.Failed("its steps are none: skipped, or without a gradient")
        counted, flops = rows[-1]["tflops"] * 1e12 / rows[-1]["tokens_per_second"], accelerator.flops_per_token(self.told["shape"], work.sequence)
        if abs(counted / flops - 1) > 1e-6:
            raise common.Failed(f"upcycle counts {counted:.6e} FLOPs a token, this script {flops:.6e}")
        seconds = [row["seconds"] for row in rows[warm_up:]]
        found = {"losses": [row["loss"] for row in rows[:COMPARED]], "gradient_norms": [row["grad_norm"] for row in rows[:COMPARED]], "start_seconds": start,
                 "peak_bytes": max((row.get("peak_bytes", 0) for row in rows), default=0), "tokens_per_expert": rows[-1].get("tokens_per_expert"), "gpu": watch.seen}
        if seconds:
            found |= {"seconds": seconds, "step_seconds": statistics.median(seconds),
                      "tokens_per_second": work.sequences * work.sequence / statistics.median(seconds)}
        return found

    def steps_of(self, work):
        return self.chosen.steps if work.sequences // work.micro_batch < self.chosen.micro_batches else max(1, self.chosen.steps // 2)

    def on_one(self, folder, work, measured):
        """One GPU's figures for `work`, measured once; further ones are asked for their losses only."""
        if work not in self.alone or (measured and "seconds" not in self.alone[work] and "failed" not in self.alone[work]):
            found = self.guarded("one GPU", lambda: self.measure(folder, 1, work.words(), work, self.steps_of(work) if measured else 0))
            self.alone[work] = {"name": "one GPU", "step": str(work), "recompute": work.recompute, "measured": measured} | found
            self.told["one_gpu"] = [*self.alone.values()]
            common.say(f"  one GPU, {work}: " + (found.get("failed") or (f"{found['tokens_per_second']:.0f} tokens/s" if measured else "losses")))
        return self.alone[work]

    def exposed(self, folder, layout):
        traces = folder / "traces"
        traces.mkdir(exist_ok=True)
        self.train(folder, self.chosen.ranks, layout.words(), 9, ("--profile", traces / f"{layout.key}.json"))   # 5 before it, 3 in it, one that proves its end
        files = [traces / f"{layout.key}-rank{rank}.json" for rank in range(self.chosen.ranks)]
        found = overlap.of_ranks(files)
        for file in files:
            if self.chosen.keep_traces:
                self.chosen.keep_traces.mkdir(parents=True, exist_ok=True)
                shutil.move(file, self.chosen.keep_traces / file.name)
            else:
                file.unlink()
        return found

    def on_all(self, folder, layout):
        alone = self.on_one(folder, layout.alone, True)
        row = {"key": layout.key, "name": layout.name, "scaling": layout.kind, "step": str(layout.work), "recompute": layout.work.recompute, "parallel": layout.parallel,
               "goal": layout.goal, "at_best": layout.at_best}
        row |= self.guarded(layout.key, lambda: self.measure(folder, self.chosen.ranks, layout.words(), layout.work, self.steps_of(layout.work)))
        if "failed" not in row:
            same = self.on_one(folder, layout.work, False)   # the same sequences: of strong scaling what was measured already
            if "failed" not in alone:
                row["of_perfect"] = row["tokens_per_second"] / alone["tokens_per_second"] / self.chosen.ranks
            if "failed" not in same:
                for key, difference in (("losses", "loss_difference"), ("gradient_norms", "norm_difference")):
                    row[difference] = max(abs(mine / theirs - 1) for mine, theirs in zip(row[key], same[key]))
                row["same"] = row["loss_difference"] <= LOSS_BOUND and row["norm_difference"] <= NORM_BOUND
            if layout.parallel.get("expert"):
                row["fullest_rank"] = fullest(row["tokens_per_expert"], layout.parallel["expert"])
            if not self.chosen.no_traces:
                trace = self.guarded(f"{layout.key}, trace", lambda: self.exposed(folder, layout))
                row |= {"trace_failed": trace["failed"]} if trace and "failed" in trace else {"trace": trace}
        self.told["layouts"].append(row)
        self.save()
        share = f", {row['of_perfect']:.1%} of perfect" if "of_perfect" in row else ""
        common.say(f"  {layout.name}: " + (row.get("failed") or f"{row['tokens_per_second']:.0f} tokens/s{share}"))

    def all(self, folder):
        chosen, told = self.chosen, self.told
        if chosen.ranks > 1 and "start-up" in chosen.only:
            told["start_up"] = self.guarded("start-up", self.start_up)
        if chosen.ranks > 1 and "collectives" in chosen.only:
            told["collectives"] = self.guarded("collectives", self.bandwidths)
        told["layouts"] = []
        if not set(chosen.only) & set(layouts.GOALS):
            return
        common.say("  step 0")
        of, recompute, _ = self.timed("step 0", lambda: self.prepare(folder))
        found = layouts.layouts(chosen, of, recompute)
        for layout in found:
            self.on_all(folder, layout)
        if chosen.ranks == 1:
            for work in (layouts.Work(chosen.sequence, chosen.micro_batch, chosen.micro_batch), layouts.Work(chosen.sequence, chosen.micro_batches, 1),
                         layouts.Work(chosen.long_sequence, 1, 1, recompute)):
                self.on_one(folder, work, True)


def fullest(tokens_per_expert, ranks):
    """Rows of the rank that has the most over the mean, the mean over layers: what natural routing alone costs."""
    shares = []
    for of_layer in tokens_per_expert:
        each = len(of_layer) // ranks
        loads = [sum(of_layer[rank * each:(rank + 1) * each]) for rank in range(ranks)]
        shares.append(max(loads) * ranks / sum(loads))
    return statistics.mean(shares)


def the_program(given, name):
    found = shutil.which(given or accelerator.program(name) or "")
    if not found:
        raise common.Failed(f"no program {given or name}: build it (cmake --build build/cuda --target {name}), or name it with --{name}")
    return Path(found).absolute()


def main(words):
    chosen = options(words)
    try:
        upcycle, collectives = the_program(chosen.upcycle, "upcycle"), the_program(chosen.collectives, "collectives")
        facts, gpu_facts = common.machine(upcycle), accelerator.facts()
        if chosen.device == "cuda":
            if not gpu_facts:
                raise common.Failed("no GPU here: nvidia-smi does not answer")
            if chosen.ranks > gpus_here() and not chosen.share_gpu:
                raise common.Failed(f"--gpus {chosen.ranks}: there are {gpus_here()}; --share-gpu tries the script on one")
        told = {"machine": facts, "gpu": gpu_facts, "ranks": chosen.ranks, "device": chosen.device, "shares_gpu": chosen.share_gpu, "model": chosen.model,
                "of_layers": accelerator.shape(chosen.model)["layers"]}
        print(common.describe(facts), flush=True)
        if chosen.json:
            chosen.json.touch()
        with tempfile.TemporaryDirectory(prefix="upcycle-bench-", dir=chosen.scratch) as scratch:
            run = Scaling(chosen, upcycle, collectives, told)
            try:
                run.all(Path(scratch).resolve())
            finally:
                run.save()
                scaling_tables.show(told)
    except (common.Failed, OSError) as error:
        print(f"tools/bench: {error}", file=sys.stderr)
        return 1
    rows = told["layouts"] or told.get("one_gpu", [])
    if any(row.get("same") is False for row in rows):
        print("\ntools/bench: a layout's losses are not one GPU's", file=sys.stderr)
        return 1
    return 0 if not rows or any("failed" not in row for row in rows) else 1
