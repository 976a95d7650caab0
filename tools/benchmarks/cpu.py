"""tools/bench cpu: our training step beside transformers', and conversion beside the disk, on this machine's cores.

The step: the same random model (dense; a mixture of 8 experts, top-2), weights, tokens, AdamW and clipping in both, each in fp32 and bf16; the
losses of the first step must agree. transformers runs in the fastest of its ways here, found out first. Runs alternate; a figure is the median
over runs of each run's median after 2 steps of warm-up, +- half the range of the runs. Conversion: see the table's head. Takes minutes."""
import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

from benchmarks import common, conversion, training


def options(words):
    parser = argparse.ArgumentParser(prog="tools/bench cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="every single number, and the machine's description")
    parser.add_argument("--only", choices=("training", "conversion"), help="one of the two tables")
    parser.add_argument("--size", choices=training.SIZES, default="medium", help="of the training step's model (default: medium)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="of the training step (default: both)")
    parser.add_argument("--steps", type=int, default=5, metavar="N", help="measured steps a run (default: 5)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="runs of everything (default: 3)")
    parser.add_argument("--threads", type=int, default=common.cores(), metavar="N", help="cores to use (default: all)")
    parser.add_argument("--model", default="0.6b", metavar="SIZE", help="converted dense Qwen3, see tools/make-dense (default: 0.6b, 1.2 GB)")
    parser.add_argument("--layers", type=int, metavar="N", help="with fewer layers than it has")
    parser.add_argument("--jobs", nargs="+", choices=conversion.JOBS, default=list(conversion.JOBS), metavar="JOB",
                        help=f"of conversion: {', '.join(conversion.JOBS)} (default: all)")
    parser.add_argument("--upcycle", type=Path, metavar="PROGRAM", help="default: the bundle's, or build/upcycle")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR",
                        help="on the disk to measure; needs 9 times the converted model's size (default: the system's for temporary files)")
    chosen = parser.parse_args(words)
    if chosen.upcycle is None:
        bundled = common.ROOT / "upcycle"
        chosen.upcycle = bundled if bundled.is_file() else common.ROOT / "build/upcycle"
    for name in ("steps", "repeats", "threads"):
        if getattr(chosen, name) < 1:
            parser.error(f"--{name} must be 1 or more")
    return chosen


def measure(chosen):
    program = shutil.which(chosen.upcycle)
    if not program:
        raise common.Failed(f"no program {chosen.upcycle}: run tools/setup, or name it with --upcycle")
    upcycle = Path(program).resolve()
    result = {"machine": common.machine(upcycle), "threads": chosen.threads}
    print(common.describe(result["machine"]), flush=True)
    with tempfile.TemporaryDirectory(prefix="upcycle-bench-", dir=chosen.scratch) as scratch:
        if chosen.only != "conversion":
            precisions = (chosen.precision,) if chosen.precision else ("fp32", "bf16")
            result["training"] = training.compare(Path(scratch), chosen.size, precisions, chosen.steps, chosen.repeats, chosen.threads, upcycle)
            training.print_table(result["training"], chosen.threads)
        if chosen.only != "training":
            result["conversion"] = conversion.compare(Path(scratch), chosen.model, chosen.layers, chosen.jobs, chosen.repeats, chosen.threads, upcycle)
            conversion.print_table(result["conversion"])
    return result


def main(words):
    chosen = options(words)
    try:
        if chosen.json:
            chosen.json.touch()
        result = measure(chosen)
    except (common.Failed, OSError) as error:
        print(f"tools/bench: {error}", file=sys.stderr)
        return 1
    if chosen.json:
        chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0
