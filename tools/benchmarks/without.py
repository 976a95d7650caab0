"""tools/bench without: what each technique brings to our training step on a GPU: the same run without it, that is, with those ops in the form that
ATen's operations give them (tools/benchmarks/without/without.cpp says which; upcycle itself has no such switch). The whole program is measured
first and last. What a technique saves in memory is told, too; without one the step may not fit, which is a line."""
import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import accelerator, common, step

TECHNIQUES = {
    "grouped_matmul": "grouped products of our own: gradients straight into fp32", "attention": "attention by cuDNN instead of flash",
    "qk_norm_rope": "q, k, v: norms and rotation in one kernel", "rms_norm": "norms with the sum before them", "swiglu": "SwiGLU with the routing weight",
    "rows": "sorting, spreading and summing rows", "router": "routing in one pass, its product on bf16 units", "cross_entropy": "loss and its gradient in one pass",
    "adamw": "AdamW and bf16 values in one pass", "overwriting": "gradients overwritten by a step's first product", "sums_of_squares": "the norm of the other gradients",
}


def options(words):
    parser = argparse.ArgumentParser(prog="tools/bench without", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="every single number, and the machine's description")
    parser.add_argument("--model", choices=accelerator.MODELS, default="1.7b-e4", metavar="NAME", help="default: 1.7b-e4")
    parser.add_argument("--techniques", nargs="+", choices=TECHNIQUES, default=list(TECHNIQUES), metavar="NAME", help=f"of {', '.join(TECHNIQUES)} (default: all)")
    parser.add_argument("--micro-batch", type=int, default=4, metavar="N")
    parser.add_argument("--sequence", type=int, default=4096, metavar="N")
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="measured steps (default: 20)")
    parser.add_argument("--warm-up", type=int, default=6, metavar="N", help="steps before them (default: 6)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="further keys of the run file")
    parser.add_argument("--program", type=Path, metavar="PROGRAM", help="upcycle_without (default: the bundle's, or that of build/cuda)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try this script")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()), metavar="DIR", help="where the model lies, twice")
    return parser.parse_args(words)


def measure(chosen, program, folder):
    of = accelerator.shape(chosen.model)
    flops = accelerator.flops_per_token(of, chosen.sequence)
    step.random_tokens(folder, of["vocab"], (chosen.warm_up + chosen.steps) * chosen.micro_batch, chosen.sequence)
    run_file, _ = step.prepare_ours(chosen, of, folder, program)
    results = []
    for technique in ["", *chosen.techniques, ""]:
        try:
            result = step.ours(chosen, of, folder, program, run_file, flops, {"WITHOUT": technique})
            if technique and f"without {technique}" not in (folder / "train.log").read_text():
                raise common.Failed(f"this model's step never asks for {technique}")
        except common.Failed as why:
            if not technique:
                raise
            common.say(str(why))
            result = {"failed": "out of memory" if "out of memory" in str(why) else str(why).strip().splitlines()[-1]}
        results.append({"without": technique} | step.add_rates(result, chosen.micro_batch * chosen.sequence, flops, None))
        common.say(f"  without {technique or 'nothing'}: " + (result.get("failed") or f"{1e3 * result['step_seconds']:.1f} ms"))
    return results


def print_table(chosen, results):
    whole = (results[0]["step_seconds"] + results[-1]["step_seconds"]) / 2
    memory = results[0]["peak_bytes"]
    rows = []
    for number, result in enumerate(results):
        name = f"without {result['without']}" if result["without"] else "all of them" + (", again" if number else "")
        if "failed" in result:
            rows.append([name, "-", "-", "-", "-", result["failed"]])
            continue
        slower = result["step_seconds"] - whole
        rows.append([name, f"{1e3 * result['step_seconds']:.1f}", f"{1e3 * slower:+.1f}", f"{100 * slower / whole:+.1f} %",
                     f"{(result['peak_bytes'] - memory) / 2**30:+.1f}" if memory else "-", TECHNIQUES.get(result["without"], "")])
    print(f"\n{chosen.model}, {chosen.micro_batch} x {chosen.sequence}: one technique less at a time\n")
    print(common.table(["step", "ms", "slower, ms", "of all", "peak GiB", "what it is"], rows))


def main(words):
    chosen = options(words)
    try:
        program = shutil.which(chosen.program or accelerator.program("upcycle_without") or "")
        if not program:
            raise common.Failed(f"no program {chosen.program or 'upcycle_without'}: build it (cmake --build build/cuda --target upcycle_without), or name it with --program")
        program = Path(program).absolute()
        facts, gpu_facts = common.machine(program), accelerator.facts()
        print(common.describe(facts), gpu_facts["name"] if gpu_facts else "", sep="\n", flush=True)
        with tempfile.TemporaryDirectory(prefix="upcycle-bench-", dir=chosen.scratch) as scratch:
            results = measure(chosen, program, Path(scratch).resolve())
        print_table(chosen, results)
        if chosen.json:
            chosen.json.write_text(json.dumps({"machine": facts, "gpu": gpu_facts, "model": chosen.model, "results": results}, indent=1) + "\n")
    except (common.Failed, OSError, subprocess.CalledProcessError) as error:
        print(f"tools/bench: {error}", file=sys.stderr)
        return 1
    return 0
