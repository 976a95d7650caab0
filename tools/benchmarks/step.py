"""tools/bench step: our training step on one GPU beside what else does the same work, in one run, one process after another.

Ours is `upcycle train` as it is: bf16 with fp32 masters, gradients and moments, clipping, data from a token file, resumed from a stored step 0.
The peers (tools/peers) keep bf16 states and do not clip unless --clip-peers says so. All train the same random start distribution on the same
random tokens with natural routing, and all FLOPs are counted by one formula (6 per weight that a token meets, causal attention; src/model/flops.cpp).
A figure is the median over the steps after the warm-up, of the periods of the device: nobody waits for it between two steps. The ceilings are
measured in the same run. A peer that is missing or runs out of memory is a line; then half the micro-batch is tried, too."""
import argparse
import json
import math
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy

from benchmarks import accelerator, common, jobs

PEERS = {   # script, its way
    "transformers": ("transformers_step.py", "eager"), "transformers-compiled": ("transformers_step.py", "compiled"),
    "compiled": ("compiled_step.py", ""), "torchtitan": ("torchtitan_step.py", "bf16"), "torchtitan-fp32": ("torchtitan_step.py", "fp32"),
}
PEER_LIMIT_SECONDS, OUR_LIMIT_SECONDS = 420, 300


def options(words):
    parser = argparse.ArgumentParser(prog="tools/bench step", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="every single number, and the machine's description")
    parser.add_argument("--model", nargs="+", choices=accelerator.MODELS, default=["1.7b-e4"], metavar="NAME", help=f"of {', '.join(accelerator.MODELS)} (default: 1.7b-e4)")
    parser.add_argument("--micro-batch", type=int, default=4, metavar="N", help="sequences of a step (default: 4)")
    parser.add_argument("--sequence", type=int, default=4096, metavar="N", help="their length (default: 4096)")
    parser.add_argument("--peers", default="transformers,compiled,torchtitan", metavar="NAME,...", help=f"of {', '.join(PEERS)}, or none (default: %(default)s)")
    parser.add_argument("--clip-peers", action="store_true", help="the peers clip their gradients, too")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="measured steps (default: 20)")
    parser.add_argument("--warm-up", type=int, default=6, metavar="N", help="steps before them (default: 6)")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="runs of everything, in turn (default: 1)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further keys of our run file, such as train.recompute=\"selective\"")
    parser.add_argument("--profile", type=Path, metavar="FILE", help="a trace of ours, of a run of its own")
    parser.add_argument("--upcycle", type=Path, metavar="PROGRAM", help="default: the bundle's, or build/cuda/upcycle")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this script; torch.compile's back end is eager there")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR",
                        help="where the model lies, twice (1.7b: 20 GB; default: the system's for temporary files)")
    chosen = parser.parse_args(words)
    chosen.peers = [] if chosen.peers == "none" else chosen.peers.split(",")
    for name in chosen.peers:
        if name not in PEERS:
            parser.error(f"--peers: no {name}; there are {', '.join(PEERS)}")
    for name in ("micro_batch", "sequence", "steps", "warm_up", "repeats"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more")
    return chosen


def random_tokens(folder, vocab, sequences, sequence):
    """Uniform ids, for the peers as [sequences, sequence + 1] and for us as Megatron's .bin/.idx, one document: labels nobody can learn."""
    stream = numpy.random.default_rng(2).integers(0, vocab, sequences * sequence + 1).astype(numpy.int32)
    numpy.save(folder / "tokens.npy", numpy.stack([stream[i * sequence:(i + 1) * sequence + 1] for i in range(sequences)]))
    (folder / "tokens.bin").write_bytes(stream.tobytes())
    (folder / "tokens.idx").write_bytes(b"MMIDIDX\0\0" + struct.pack("<QBQQiqqq", 1, 4, 1, 2, len(stream), 0, 0, 1))


def prepare_ours(chosen, of, folder, upcycle):
    """A run directory with step 0; returns the run file, and the seconds that the conversion took."""
    common.run([accelerator.python(), Path(__file__).with_name("random_model.py"), folder / "model", json.dumps(of)], common.environment(common.cores()))
    run_file = folder / "run.toml"
    run_file.write_text(f"""[run]
name = "bench"
directory = "{folder}/run"
device = "{chosen.device}"
[source]
model = "{folder}/model"
[train]
steps = 1000000
sequence = {chosen.sequence}
global_batch = {chosen.micro_batch}
micro_batch = {chosen.micro_batch}
precision = "bf16"
[optimizer]
lr = 1e-5
schedule = "constant"
clip = 1.0
[balance]
aux = 0.0
[data]
train = [[1.0, "{folder}/tokens"]]
split = [1, 0, 0]
[checkpoint]
every = 1000000000
[log]
every = 5
experts_every = 0
""")
    return run_file, common.run([upcycle, "convert", run_file, *set_words(chosen)], common.environment(common.cores()), cwd=folder).seconds


def set_words(chosen):
    return ["--set", *chosen.set] if chosen.set else []


def train(command, environment, folder, wanted):
    """Starts the run, waits for as many steps, and kills it: (the lines of its steps, seconds from its start to the first)."""
    metrics, log = folder / "run/metrics.jsonl", folder / "train.log"
    metrics.unlink(missing_ok=True)
    rows, first, rest = [], None, ""
    with log.open("w") as out:
        begin = time.monotonic()
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=folder, start_new_session=True)
    try:
        stream = None
        while len(rows) < wanted:
            if stream is None and metrics.exists():
                stream = metrics.open()
            said = stream.read() if stream else ""
            *lines, rest = (rest + said).split("\n")
            rows += [row for row in map(json.loads, lines) if row["kind"] == "step"]
            if rows and first is None:
                first = time.monotonic() - begin
            if not said and process.poll() is not None:
                raise common.Failed(f"{' '.join(map(str, command))}\nended with code {process.returncode} after {len(rows)} steps:\n{log.read_text()[-3000:]}")
            if time.monotonic() - begin > OUR_LIMIT_SECONDS:
                raise common.Failed(f"{len(rows)} steps after {OUR_LIMIT_SECONDS} s:\n{log.read_text()[-3000:]}")
            time.sleep(0.005)
    finally:
        if process.poll() is None:
            jobs.end(process)   # it would store its state, many times the model's size
    return rows[:wanted], first


def ours(chosen, of, folder, upcycle, run_file, flops, environment=None):
    with accelerator.Watch() as watch:
        rows, start = train([upcycle, "train", run_file, *set_words(chosen)], common.environment(common.cores()) | (environment or {}), folder,
                            chosen.warm_up + chosen.steps)
    if any(row["skipped"] or not math.isfinite(row["loss"] or math.nan) or not row["grad_norm"] > 0 for row in rows):
        raise common.Failed("our steps are none: skipped, or without a gradient")
    counted = rows[-1]["tflops"] * 1e12 / rows[-1]["tokens_per_second"]
    if abs(counted / flops - 1) > 1e-6:
        raise common.Failed(f"upcycle counts {counted:.6e} FLOPs a token, this script {flops:.6e}")
    return {"seconds": [row["seconds"] for row in rows[chosen.warm_up:]], "losses": [row["loss"] for row in rows], "gradient_norm": rows[0]["grad_norm"],
            "states": "float32", "clips": True, "peak_bytes": max((row.get("peak_bytes", 0) for row in rows), default=0), "start_seconds": start,
            "load_max_over_mean": statistics.median(row["load_max_over_mean"] for row in rows), "gpu": watch.seen}


def theirs(chosen, of, name, folder, micro_batch):
    script, way = PEERS[name]
    step = of | {"sequence": chosen.sequence, "micro_batch": micro_batch, "tokens": str(folder / "tokens.npy"), "warm_up": chosen.warm_up, "steps": chosen.steps,
                 "device": chosen.device, "backend": "inductor" if chosen.device == "cuda" else "eager", "clip": chosen.clip_peers, "way": way}
    with accelerator.Watch() as watch:
        try:
            done = subprocess.run([accelerator.python(), accelerator.PEERS / script, json.dumps(step)], capture_output=True, text=True, timeout=PEER_LIMIT_SECONDS,
                                  env=common.environment(common.cores()), cwd=folder)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {PEER_LIMIT_SECONDS} s"}
    told = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not told:
        return {"failed": f"ended with code {done.returncode}: {(done.stderr.strip().splitlines() or ['without a word'])[-1][:200]}"}
    return json.loads(told[-1]) | {"clips": chosen.clip_peers, "gpu": watch.seen}


def add_rates(result, tokens, flops, peak):
    """Rates follow from the median step alone."""
    if "failed" not in result:
        result["step_seconds"] = statistics.median(result["seconds"])
        result["tokens_per_second"] = tokens / result["step_seconds"]
        result["flops_per_second"] = result["tokens_per_second"] * flops
        result["mfu"] = result["flops_per_second"] / peak if peak else None
    return result


def compare(chosen, model, upcycle, folder, gpu_facts):
    of = accelerator.shape(model)
    flops, peak = accelerator.flops_per_token(of, chosen.sequence), accelerator.peak_flops(gpu_facts["name"]) if gpu_facts else None
    tokens = chosen.micro_batch * chosen.sequence
    random_tokens(folder, of["vocab"], (chosen.warm_up + chosen.steps) * chosen.micro_batch, chosen.sequence)
    common.say(f"  {model}: ceilings")
    asked = json.dumps(of | {"tokens": tokens, "device": chosen.device})
    with accelerator.Watch() as watch:
        done = common.run([accelerator.python(), Path(__file__).with_name("ceilings.py"), asked], common.environment(common.cores()))
    ceilings = json.loads(done.output.splitlines()[-1]) | {"gpu": watch.seen}
    results = []

    def add(name, measure, micro_batch):
        result = add_rates(measure(), micro_batch * chosen.sequence, flops, peak)
        results.append({"who": name, "micro_batch": micro_batch} | result)
        common.say(f"  {model}: {name}, {micro_batch} x {chosen.sequence}: "
                   + (result.get("failed") or f"{1e3 * result['step_seconds']:.1f} ms, loss {result['losses'][0]:.3f} -> {result['losses'][-1]:.3f}"))
        return result

    def guarded(measure):
        try:
            return measure()
        except common.Failed as why:
            common.say(str(why))
            return {"failed": "see above"}

    common.say(f"  {model}: our step 0")
    run_file, convert_seconds = prepare_ours(chosen, of, folder, upcycle)
    for _ in range(chosen.repeats):
        add("ours", lambda: guarded(lambda: ours(chosen, of, folder, upcycle, run_file, flops)), chosen.micro_batch)
        for name in chosen.peers:
            half = add(name, lambda name=name: theirs(chosen, of, name, folder, chosen.micro_batch), chosen.micro_batch).get("failed") == "out of memory"
            if half and chosen.micro_batch > 1:
                add(name, lambda name=name: theirs(chosen, of, name, folder, chosen.micro_batch // 2), chosen.micro_batch // 2)
    if chosen.profile:   # of a run of its own: a traced step takes longer
        guarded(lambda: train([upcycle, "train", run_file, "--profile", chosen.profile.resolve(), *set_words(chosen)], common.environment(common.cores()), folder, 10))
    return {"model": model, "shape": of, "sequence": chosen.sequence, "flops_per_token": flops, "peak_flops": peak, "ceilings": ceilings,
            "convert_seconds": convert_seconds, "results": results}


def merged(results):
    """One entry for everyone and micro-batch: the median over repeats of the medians; what else is told is the last repeat's."""
    whole = {}
    for result in results:
        whole.setdefault((result["who"], result["micro_batch"]), []).append(result)
    for entries in whole.values():
        good = [entry for entry in entries if "failed" not in entry]
        if not good:
            yield entries[-1]
            continue
        middle = statistics.median_low(entry["step_seconds"] for entry in good)
        best = next(entry for entry in good if entry["step_seconds"] == middle)
        yield best | {"peak_bytes": max(entry["peak_bytes"] for entry in good)}


def print_table(one):
    ceilings, tokens_of = one["ceilings"], one["sequence"]
    tera = 1e12
    rows, failures, entries = [], [], list(merged(one["results"]))
    reference = next((entry for entry in entries if entry["who"] == "ours" and "failed" not in entry), None)
    for entry in entries:
        size = f"{entry['micro_batch']}x{one['sequence']}"
        if "failed" in entry:
            failures.append(f"{entry['who']}, {size}: {entry['failed']}")
            rows.append([entry["who"], size, *["-"] * 10, "none, see below"])
            continue
        seen = entry.get("gpu", {})
        rows.append([entry["who"] + (f" {entry['version']}" if entry.get("version") else ""), size, entry["states"].replace("float", "fp").replace("bfp", "bf"),
                     "yes" if entry["clips"] else "no", f"{1e3 * entry['step_seconds']:.1f}", f"{100 * common.spread(entry['seconds']):.1f} %",
                     f"{entry['tokens_per_second']:.0f}", f"{entry['flops_per_second'] / tera:.1f}", f"{100 * entry['mfu']:.1f} %" if entry["mfu"] else "-",
                     f"{entry['peak_bytes'] / 2**30:.1f}" if entry["peak_bytes"] else "-",
                     f"{seen['sm_mhz']:.0f} / {seen['watts']:.0f}" if seen else "-",
                     f"{reference['tokens_per_second'] / entry['tokens_per_second']:.3f}" if reference else "-",
                     f"{entry['losses'][0]:.3f} -> {entry['losses'][-1]:.3f}"])
    print(f"\nTraining step, {one['model']}: {one['shape']['experts']} experts, top-{one['shape']['top_k']}, {one['flops_per_token'] / 1e9:.2f} GFLOP a token\n")
    print(common.table(["who", "micro-batch", "states", "clips", "ms", "+-", "tokens/s", "TFLOP/s", "MFU", "peak GiB", "SM MHz / W", "ours/it", "loss"], rows))
    print("".join(f"\n{failure}" for failure in failures), end="\n" if failures else "")
    seconds, tokens = ceilings["products_seconds"], one["results"][0]["micro_batch"] * tokens_of
    print(f"\nCeilings here: copy {ceilings['copy_bytes_per_second'] / tera:.2f} TB/s, product of {ceilings['gemm_side']}^3 {ceilings['gemm_flops_per_second'] / tera:.0f} TFLOP/s; "
          f"this step's matrix products alone, each at the rate of its shape: {1e3 * seconds:.1f} ms, {one['flops_per_token'] * tokens / seconds / tera:.0f} TFLOP/s"
          + (f" ({ceilings['gpu']['sm_mhz']:.0f} MHz, {ceilings['gpu']['watts']:.0f} W)" if ceilings.get("gpu") else ""))
    if reference:
        print(f"Start: {reference['start_seconds']:.2f} s from a cold process, resumed from its stored step 0, to its first step; fullest expert over mean "
              f"{reference['load_max_over_mean']:.2f}; gradient norm of the first step {reference['gradient_norm']:.3f}")


def main(words):
    chosen = options(words)
    try:
        upcycle = shutil.which(chosen.upcycle or accelerator.program("upcycle") or "")
        if not upcycle:
            raise common.Failed(f"no program {chosen.upcycle or 'upcycle'}: build it, or name it with --upcycle")
        upcycle = Path(upcycle).absolute()
        facts, gpu_facts = common.machine(upcycle), accelerator.facts()
        if chosen.device == "cuda" and not gpu_facts:
            raise common.Failed("no GPU here: nvidia-smi does not answer")
        if chosen.json:
            chosen.json.touch()
        print(common.describe(facts))
        if gpu_facts:
            print(f"{gpu_facts['name']}, driver {gpu_facts['driver']}, power limit {gpu_facts['power_limit_w']} W", flush=True)
        everything = []
        for model in chosen.model:
            with tempfile.TemporaryDirectory(prefix="upcycle-bench-", dir=chosen.scratch) as scratch:
                everything.append(compare(chosen, model, upcycle, Path(scratch).resolve(), gpu_facts))
            print_table(everything[-1])
            sys.stdout.flush()
            if chosen.json:   # after each: what a time limit cuts off is lost, but no more
                chosen.json.write_text(json.dumps({"machine": facts, "gpu": gpu_facts, "models": everything}, indent=1) + "\n")
    except (common.Failed, OSError) as error:
        print(f"tools/bench: {error}", file=sys.stderr)
        return 1
    measured = all(any(result["who"] == "ours" and "failed" not in result for result in one["results"]) for one in everything)
    return 0 if measured else 1
