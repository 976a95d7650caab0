"""The quickstart's training on one GPU against the same run on the CPU: quickstart_on_gpu.py UPCYCLE [STEPS]

Runs the 8-expert, the 32-expert and the dense run of configs/quickstart.toml on one rank each: CPU fp32, GPU fp32 (no TF32), GPU
bf16; and the 8-expert run on two ranks that share the GPU. Needs what tools/quickstart has made in runs/quickstart (corpus and
hf-dense). Bounds: the first five fp32 losses equal the CPU's to 1e-5 relative, the last within 0.5 %. Exits 77 without a GPU.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

MODELS = {
    "dense": ["moe.experts=0"],
    "8 experts, top-2": ["moe.experts=8"],
    "32 experts, top-8": ["moe.experts=32", "moe.granularity=4", "moe.top_k=8"],
}


def train(upcycle, scratch, name, settings, ranks=1):
    directory = pathlib.Path(scratch) / name.replace(" ", "-").replace(",", "")
    command = [upcycle, "train", "configs/quickstart.toml"]
    if ranks > 1:
        command = ["mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks), *command]
    for setting in [f"run.directory={directory}", *settings]:
        command += ["--set", setting]
    environment = dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\nleft with code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    lines = [json.loads(line) for line in open(directory / "metrics.jsonl")]
    steps = [line for line in lines if line["kind"] == "step"]
    shutil.rmtree(directory)
    rate = sorted(line["tokens_per_second"] for line in steps)[len(steps) // 2]
    return [line["loss"] for line in steps], rate


def compare(label, cpu, gpu, rate, exact, failures):
    relative = [abs(a - b) / abs(a) for a, b in zip(cpu, gpu)]
    print(f"{label:<46}{max(relative[:5]):>12.1e}{relative[-1]:>12.1e}{gpu[-1]:>10.4f}{rate:>12.0f}", flush=True)
    if exact and (max(relative[:5]) > 1e-5 or relative[-1] > 5e-3):
        failures.append(label)


def main():
    if not shutil.which("nvidia-smi") or subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode != 0:
        sys.exit(77)
    upcycle, steps = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 40
    common = [f"train.steps={steps}", f"checkpoint.every={steps}", "validate.every=0"]
    one = [*common, "parallel.expert=1"]
    failures = []
    print(f"{'relative difference of the loss to CPU fp32':<46}{'steps 1-5':>12}{'last step':>12}{'last loss':>10}{'tokens/s':>12}")
    with tempfile.TemporaryDirectory() as scratch:
        for model, settings in MODELS.items():
            cpu, rate = train(upcycle, scratch, f"{model} cpu", [*one, *settings, "run.device=cpu"])
            compare(f"{model}, CPU fp32", cpu, cpu, rate, True, failures)
            for precision in ("fp32", "bf16"):
                gpu, rate = train(upcycle, scratch, f"{model} gpu {precision}",
                                  [*one, *settings, "run.device=cuda", f"train.precision={precision}"])
                compare(f"{model}, GPU {precision}", cpu, gpu, rate, precision == "fp32", failures)
            if model == "8 experts, top-2":
                gpu, rate = train(upcycle, scratch, f"{model} two", [*common, *settings, "run.device=cuda", "parallel.expert=2"], ranks=2)
                compare(f"{model}, GPU fp32, 2 ranks by host memory", cpu, gpu, rate, True, failures)
    if failures:
        sys.exit("outside the bounds: " + "; ".join(failures))
    print("all fp32 runs are inside the bounds")


if __name__ == "__main__":
    main()
