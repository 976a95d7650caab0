"""tools/bench gpu: all that a GPU machine is asked, from a bundle or a clone, in one go: tests first, then ops, moe-layer and step; their
tables at the end once more. What follows a test that fails is not measured. --out DIR gets the JSON of every part, and all output as log.txt.

  cmake --build build/cuda --target upcycle gpu_tests
  tools/bundle bundle build/cuda/upcycle --with build/cuda/gpu_bench build/cuda/tests/gpu_ops build/cuda/tests/gpu_step
  bundle/tools/bench gpu --tests gpu_ops gpu_step --out results

--parts ... without needs --with build/cuda/upcycle_without, too."""
import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import accelerator, common

PARTS = ("ops", "moe-layer", "step", "without")


def options(words):
    parser = argparse.ArgumentParser(prog="tools/bench gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench-results"), metavar="DIR", help="default: bench-results")
    parser.add_argument("--tests", nargs="*", default=[], metavar="PROGRAM", help="googletest programs of the bundle or of build/cuda/tests")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=list(PARTS[:3]), metavar="PART", help=f"of {', '.join(PARTS)} (default: the first three)")
    parser.add_argument("--step", default="", metavar="WORDS", help="further words for tools/bench step, as in --step='--model 0.6b-e8 --peers torchtitan'")
    return parser.parse_args(words)


def program(name):
    place = accelerator.program(name) or common.ROOT / "build/cuda/tests" / name
    if not place.exists():
        raise common.Failed(f"no program {name} in {common.ROOT}")
    return place


def run(words, log):
    """Prints and keeps what it says; (exit code, what it said)."""
    begin, said = time.monotonic(), []
    print(f"\n== {' '.join(map(str, words))}", flush=True)
    process = subprocess.Popen(list(map(str, words)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=common.environment(common.cores()))
    for line in process.stdout:
        print(line, end="", flush=True)
        said.append(line)
    code = process.wait()
    print(f"== code {code} after {time.monotonic() - begin:.0f} s", flush=True)
    log.write(f"== {words}\n{''.join(said)}== code {code}\n")
    log.flush()
    return code, "".join(said)


def main(words):
    chosen = options(words)
    chosen.out.mkdir(parents=True, exist_ok=True)
    tables, failed = [], []
    try:
        with (chosen.out / "log.txt").open("w") as log:
            for test in chosen.tests:
                if run([program(test), "--gtest_brief=1"], log)[0] != 0:
                    failed.append(test)
            for part in chosen.parts if not failed else ():
                further = chosen.step.split() if part == "step" else []
                code, said = run([sys.executable, common.ROOT / "tools/bench", part, "--json", chosen.out / f"{part}.json", *further], log)
                tables.append(said)
                if code:
                    failed.append(part)
    except (common.Failed, OSError) as error:
        print(f"tools/bench: {error}", file=sys.stderr)
        return 1
    print("\n" + "=" * 100 + "\n" + "\n".join(line for said in tables for line in said.splitlines() if not line.startswith("  ")), flush=True)
    if failed:
        print(f"\nfailed: {', '.join(failed)}")
    return 1 if failed else 0
