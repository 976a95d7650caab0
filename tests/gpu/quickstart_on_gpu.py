"""The quickstart's training on one GPU against the same run on the CPU: quickstart_on_gpu.py UPCYCLE [STEPS]

Runs the 8-expert, the 32-expert and the dense run of configs/quickstart.toml on one rank each: CPU fp32, GPU fp32 (no TF32), GPU
bf16; and the 8-expert run on two ranks that share the GPU, by host memory and by NCCL, and once more with a stop by USR2 in it, a
resume and an export. Needs what tools/quickstart has made in runs/quickstart (corpus and hf-dense).
Bounds: the first five fp32 losses equal the CPU's to 1e-5 relative, the last within 0.5 %; a resumed run ends within 0.01 % of the
uninterrupted one. Exits 77 without a GPU.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from gpu_here import skip_without_gpu

MODELS = {
    "dense": ["moe.experts=0"],
    "8 experts, top-2": ["moe.experts=8"],
    "32 experts, top-8": ["moe.experts=32", "moe.granularity=4", "moe.top_k=8"],
}
ENVIRONMENT = dict(os.environ, OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
# NCCL refuses two ranks of one host on one GPU; so each gets a host of its own, and they meet on the loopback device.
ONE_GPU_BY_NCCL = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1", "NCCL_NVLS_ENABLE": "0"}


def command_of(upcycle, directory, settings, ranks=1, nccl=False):
    command = [upcycle, "train", "configs/quickstart.toml"]
    for setting in [f"run.directory={directory}", *settings]:
        command += ["--set", setting]
    if ranks == 1:
        return command
    line = ["mpirun", "--oversubscribe", "--bind-to", "none"]
    for rank in range(ranks):
        line += [":"] if rank else []
        line += ["-np", "1", *(["-x", f"NCCL_HOSTID=rank{rank}"] if nccl else []), *command]
    return line


def run(command, wanted=0):
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT | ONE_GPU_BY_NCCL)
    if done.returncode != wanted:
        sys.exit(f"{' '.join(command)}\nleft with code {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def steps_of(directory):
    if not (directory / "metrics.jsonl").exists():
        return []
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "step"]


def train(upcycle, scratch, name, settings, **how):
    directory = pathlib.Path(scratch) / name.replace(" ", "-").replace(",", "")
    run(command_of(upcycle, directory, settings, **how))
    steps = steps_of(directory)
    shutil.rmtree(directory)
    rate = sorted(line["tokens_per_second"] for line in steps)[len(steps) // 2]
    return [line["loss"] for line in steps], rate


def stop_resume_export(upcycle, scratch, settings, uninterrupted):
    """Stopped by USR2 on its way, and on again by the same command; the last loss, where it stopped, and the exported folder."""
    directory = pathlib.Path(scratch) / "stopped"
    command = command_of(upcycle, directory, settings)
    with open(directory.with_suffix(".log"), "w") as log:
        stopped = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)
        while stopped.poll() is None and len(steps_of(directory)) < 5:
            time.sleep(0.05)
        stopped.send_signal(signal.SIGUSR2)
        if stopped.wait() != 75:
            sys.exit(f"stopped by USR2, left with {stopped.returncode}: {directory.with_suffix('.log').read_text()[-4000:]}")
    at = len(steps_of(directory))
    run(command)
    losses = [line["loss"] for line in steps_of(directory)]
    export = pathlib.Path(scratch) / "exported"
    run([upcycle, "export", str(directory), str(export)])
    experts = json.loads((export / "config.json").read_text())["num_experts"]
    same = sum(a == b for a, b in zip(losses, uninterrupted))
    relative = abs(losses[-1] / uninterrupted[-1] - 1) if len(losses) == len(uninterrupted) else float("inf")
    print(f"USR2 after {at} steps, resumed to {len(losses)}: {same} losses bitwise those of the uninterrupted run, the last within "
          f"{relative:.1e}; exported {experts} experts", flush=True)
    return at < len(losses) and relative <= 1e-4 and experts == 8


def compare(label, cpu, gpu, rate, exact, failures):
    relative = [abs(a - b) / abs(a) for a, b in zip(cpu, gpu)]
    print(f"{label:<46}{max(relative[:5]):>12.1e}{relative[-1]:>12.1e}{gpu[-1]:>10.4f}{rate:>12.0f}", flush=True)
    if exact and (max(relative[:5]) > 1e-5 or relative[-1] > 5e-3):
        failures.append(label)


def main():
    skip_without_gpu()
    upcycle, steps = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 40
    common = [f"train.steps={steps}", f"checkpoint.every={steps}", "validate.every=0"]
    one = [*common, "parallel.expert=1"]
    failures = []
    print(f"{'relative difference of the loss to CPU fp32':<46}{'steps 1-5':>12}{'last step':>12}{'last loss':>10}{'tokens/s':>12}")
    with tempfile.TemporaryDirectory() as scratch:
        for model, settings in MODELS.items():
            cpu, rate = train(upcycle, scratch, f"{model} cpu", [*one, *settings, "run.device=cpu"])
            compare(f"{model}, CPU fp32", cpu, cpu, rate, True, failures)
            on_gpu = {}
            for precision in ("fp32", "bf16"):
                on_gpu[precision], rate = train(upcycle, scratch, f"{model} gpu {precision}",
                                                [*one, *settings, "run.device=cuda", f"train.precision={precision}"])
                compare(f"{model}, GPU {precision}", cpu, on_gpu[precision], rate, precision == "fp32", failures)
            if model != "8 experts, top-2":
                continue
            for transport in ("host memory", "NCCL"):
                nccl = transport == "NCCL"
                two = [*common, *settings, "run.device=cuda", "run.share_gpu=true", "parallel.expert=2",
                       f"run.transport={'nccl' if nccl else 'auto'}"]
                gpu, rate = train(upcycle, scratch, f"{model} two {transport}", two, ranks=2, nccl=nccl)
                compare(f"{model}, GPU fp32, 2 ranks by {transport}", cpu, gpu, rate, True, failures)
            if not stop_resume_export(upcycle, scratch, [*one, *settings, "run.device=cuda"], on_gpu["fp32"]):
                failures.append("stop, resume and export")
    if failures:
        sys.exit("outside the bounds: " + "; ".join(failures))
    print("all fp32 runs are inside the bounds")


if __name__ == "__main__":
    main()
