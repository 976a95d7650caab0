"""tools/bench ops: every operation of a training step on a GPU, forward and backward, at the shapes of 1.7B E4, 1.7B E32 G8 and 14B E64 G8.

Its bound: the bytes that it must move over the rate of a large copy, or its FLOPs over the rate of a large matrix product, whichever is more;
both rates are measured first, in the same process. Beside it, the same by ATen's own operations with ATen's own gradients (in bf16; ours add
into fp32). Medians of device time, with the GPU's cache overwritten before each run, and the host ahead."""
import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks import accelerator, common


def options(part, words, text):
    parser = argparse.ArgumentParser(prog=f"tools/bench {part}", description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="every single number, and the GPU's description")
    parser.add_argument("--program", type=Path, metavar="PROGRAM", help="gpu_bench (default: the bundle's, or that of build/cuda, built first)")
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU does at once: to try this script")
    return parser.parse_args(words)


def measure(part, chosen):
    """(the ceilings that gpu_bench found, its further lines, the GPU's facts, its clocks)."""
    built = common.ROOT / "build/cuda"
    if not chosen.program and (built / "CMakeCache.txt").exists():
        subprocess.run(["cmake", "--build", built, "--target", "gpu_bench"], check=True, stdout=subprocess.DEVNULL)
    program = chosen.program or accelerator.program("gpu_bench")
    if not program or not Path(program).exists():
        raise common.Failed(f"no program {program or 'gpu_bench'}: build it (cmake --build build/cuda --target gpu_bench), or name it with --program")
    with accelerator.Watch() as watch:
        done = common.run([Path(program).absolute(), part, *(["--tiny"] if chosen.tiny else [])], common.environment(common.cores()))
    lines = [json.loads(line) for line in done.output.splitlines() if line.startswith("{")]
    return lines[0], lines[1:], accelerator.facts(), watch.seen


def heading(ceilings, facts, seen):
    text = (f"{ceilings['device']}{', driver ' + facts['driver'] if facts else ''}: copy {ceilings['copy_bytes_per_second'] / 1e12:.2f} TB/s, "
            f"product of {ceilings['side']}^3 {ceilings['product_flops_per_second'] / 1e12:.0f} TFLOP/s")
    return text + (f"; {seen['sm_mhz']:.0f} MHz, {seen['watts']:.0f} W" if seen else "")


def reached(line):
    """What it does of what bounds it: TFLOP/s or TB/s."""
    by_flops = line["bound_flops"]
    return f"{line['flops' if by_flops else 'bytes'] / line['seconds'] / 1e12:.{0 if by_flops else 2}f} {'TFLOP/s' if by_flops else 'TB/s'}"


def print_tables(lines):
    for shape in dict.fromkeys(line["shape"] for line in lines):
        rows = [[line["op"], f"{1e3 * line['seconds']:.3f}", f"{100 * line['spread']:.0f} %", f"{1e3 * line['bound_seconds']:.3f}",
                 f"{100 * line['share_of_bound']:.0f} %", reached(line), f"{1e3 * line['plain_seconds']:.3f}" if "plain_seconds" in line else "-",
                 f"{line['plain_seconds'] / line['seconds']:.2f}" if "plain_seconds" in line else "-"]
                for line in lines if line["shape"] == shape]
        print(f"\n{shape}\n")
        print(common.table(["operation", "ms", "+-", "bound ms", "share of its bound", "rate", "ATen ms", "ATen/ours"], rows))


def main(words):
    chosen = options("ops", words, __doc__)
    try:
        ceilings, lines, facts, seen = measure("ops", chosen)
        for line in lines:
            line["bound_flops"] = line["flops"] / ceilings["product_flops_per_second"] > line["bytes"] / ceilings["copy_bytes_per_second"]
        print(heading(ceilings, facts, seen))
        print_tables(lines)
        if chosen.json:
            chosen.json.write_text(json.dumps({"gpu": facts, "clocks": seen, "ceilings": ceilings, "operations": lines}, indent=1) + "\n")
    except (common.Failed, OSError, subprocess.CalledProcessError) as error:
        print(f"tools/bench: {error}", file=sys.stderr)
        return 1
    return 0
