"""tools/bench checkpoint: saving, loading and verifying a training state beside plain files of the same bytes, on one disk, fsync included.

The state: a mixture grown from a dense Qwen3's shape, cut to a few layers: bf16 weights, fp32 masters, two fp32 moments. Layouts of whole rows
(data with ZeRO-1, experts) and, apart, tensor parallelism with its column cuts. Beside each save, load and `upcycle verify`, in turn, as many processes write
the same bytes into one plain file from as much memory, and read the checkpoint's own files, with pwrite and pread; plain writing is done with O_DIRECT and, twice,
after all else, without; the faster one counts. A ratio of 1: as fast as that. Who comes first changes from repeat to repeat: what was written last may still lie in a cache behind the disk. Files are
dropped from the page cache before they are read. Extra memory: of a rank, beyond its state, of which it writes "MiB a rank".
Figures are medians over repeats; --json has all of them.

--asynchronous: from a copy, behind the steps, its memory taken before; a step waits for the copy alone: "stall". --streamed: behind the steps as where
there is no memory for a copy; "update waits": how long after the save began weights may change again. On a GPU machine, from a bundle:
  cmake --build build/cuda --target upcycle checkpoint_io
  tools/bundle bundle build/cuda/upcycle --with build/cuda/checkpoint_io
  bundle/tools/bench checkpoint --device cuda --asynchronous --layers 28 --ranks 1"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import common

LAYOUTS = {"whole rows": lambda ranks: {"expert": ranks}, "column cuts": lambda ranks: {"tensor": ranks}}


def options(words):
    parser = argparse.ArgumentParser(prog="tools/bench checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="every single number, and the machine's description")
    parser.add_argument("--model", default="0.6b", help="dense shape, a file of configs/models (default: 0.6b)")
    parser.add_argument("--layers", type=int, default=4, metavar="N", help="of its layers (default: 4)")
    parser.add_argument("--experts", type=int, default=8, metavar="N", help="default: 8")
    parser.add_argument("--ranks", default="1,2,4", metavar="N,...", help="default: 1,2,4")
    parser.add_argument("--repeats", type=int, default=6, metavar="N", help="default: 6; with a multiple of 6 each comes first as often as last")
    behind = parser.add_mutually_exclusive_group()
    behind.add_argument("--asynchronous", action="store_true", help="behind the steps, from a copy: what a step waits for is told, too")
    behind.add_argument("--streamed", action="store_true", help="behind the steps, with no room for a copy")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where the state lies (default: cpu)")
    parser.add_argument("--transfer", default="auto", choices=["auto", "direct", "buffered", "independent"])
    parser.add_argument("--build", default=str(common.ROOT / "build/cpu"), metavar="DIR", help="build tree (default: build/cpu)")
    parser.add_argument("--scratch", metavar="DIR", help="on the disk to measure (default: the system's for temporary files)")
    given = parser.parse_args(words)
    try:
        given.ranks = [int(number) for number in given.ranks.split(",")]
    except ValueError:
        parser.error(f"--ranks: no list of numbers: {given.ranks}")
    for name, numbers in (("ranks", given.ranks), ("layers", [given.layers]), ("experts", [given.experts]), ("repeats", [given.repeats])):
        if min(numbers) < 1:
            parser.error(f"--{name} must be 1 or more")
    return given


def architecture(folder, model, layers):
    known = {path.stem.removeprefix("qwen3-"): path for path in (common.ROOT / "configs/models").glob("qwen3-*.json")}
    if model not in known:
        raise common.Failed(f"--model {model}: there are {', '.join(sorted(known))}")
    config = json.loads(known[model].read_text()) | {"num_hidden_layers": layers}
    path = folder / "architecture.json"
    path.write_text(json.dumps(config))
    return path


def measure(program, folder, given, ranks, parallel, path):
    run = folder / "run.toml"
    run.write_text(f'[run]\ndevice = "{given.device}"\n[source]\narchitecture = "{path}"\n[moe]\nexperts = {given.experts}\ntop_k = 2\n[data]\ntrain = "mock"\n[parallel]\n'
                   + "".join(f"{key} = {value}\n" for key, value in parallel.items())
                   + f'[checkpoint]\ntransfer = "{given.transfer}"\nasynchronous = {str(given.asynchronous or given.streamed).lower()}\n')
    done = common.run(common.on_ranks(ranks, program, run, folder, given.repeats, *["streamed"] * given.streamed), common.environment(1))
    shutil.rmtree(folder / "run", ignore_errors=True)
    (folder / "plain").unlink(missing_ok=True)
    return [json.loads(line) for line in done.output.splitlines() if line.startswith("{")]


def row(name, ranks, results, behind):
    median = lambda key: statistics.median(result[key] for result in results if key in result)   # noqa: E731
    size = results[0]["bytes"]
    writes = [result["save_seconds"] for result in results]
    plain = min(median("plain_write_seconds"), median("plain_direct_write_seconds"))
    cells = [name, ranks, f"{size / 1e9:.2f}", f"{size / median('save_seconds') / 1e9:.2f}", f"{plain / median('save_seconds'):.2f}", f"{100 * common.spread(writes):.0f} %",
             f"{size / median('load_seconds') / 1e9:.2f}", f"{median('plain_read_seconds') / median('load_seconds'):.2f}",
             f"{size / median('verify_seconds') / 1e9:.2f}", f"{median('plain_read_seconds') / median('verify_seconds'):.2f}",
             f"{size / ranks / 2**20:.0f}", f"{median('save_extra_bytes') / 2**20:.0f}", f"{median('load_extra_bytes') / 2**20:.0f}"]
    if not behind:
        return cells
    return cells + [f"{median('stall_seconds'):.2f}", f"{size / ranks / median('stall_seconds') / 1e9:.1f}", f"{median('update_waits_seconds'):.2f}"]


def main(words):
    given = options(words)
    try:
        build = Path(given.build)
        program = common.ROOT / "checkpoint_io"   # of a bundle
        if not program.exists():
            if not (build / "CMakeCache.txt").exists():
                raise common.Failed(f"--build {build}: no build tree; tools/setup makes one")
            subprocess.run(["cmake", "--build", build, "--target", "checkpoint_io"], check=True, stdout=subprocess.DEVNULL)
            program = build / "checkpoint_io"
        facts = common.machine(program.parent / "upcycle")
        print(common.describe(facts))
        results, rows = [], []
        with tempfile.TemporaryDirectory(prefix="upcycle-bench-", dir=given.scratch) as scratch:
            folder = Path(scratch)
            path = architecture(folder, given.model, given.layers)
            for name, parallel in LAYOUTS.items():
                for ranks in given.ranks:
                    if ranks == 1 and rows:
                        continue
                    found = measure(program, folder, given, ranks, parallel(ranks), path)
                    results += [result | {"layout": name} for result in found]
                    rows.append(row(name, ranks, found, given.asynchronous or given.streamed))
                    common.say(f"  {name}, {ranks} ranks: saved at {rows[-1][4]} of plain writing, loaded at {rows[-1][7]} and verified at {rows[-1][9]} "
                               "of plain reading")   # a run may be cut short
                    if given.json:
                        Path(given.json).write_text(json.dumps({"machine": facts, "results": results}, indent=1))
        heads = ["layout", "ranks", "GB", "save GB/s", "of plain", "+-", "load GB/s", "of plain", "verify GB/s", "of plain", "MiB a rank", "extra memory, MiB: save", "load"]
        print(f"\nCheckpoints, {given.model} with {given.experts} experts, {given.layers} layers, with optimizer state\n")
        print(common.table(heads + (["stall, s", "GB/s a rank", "update waits, s"] if given.asynchronous or given.streamed else []), rows))
    except (common.Failed, OSError) as error:
        print(f"tools/bench: {error}", file=sys.stderr)
        return 2
    return 0
