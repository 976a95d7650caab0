"""What the parts of tools/bench that measure a GPU share: its facts, its clocks and power while something runs, the models, and the one
formula by which all floating-point operations are counted."""
import os
import statistics
import subprocess
import sys
import threading
from pathlib import Path

from benchmarks import common

PEERS = common.ROOT / "tools/peers"
MODELS = {   # hidden, width of an expert, layers, heads, key/value heads, head width, vocabulary, experts, top-k
    "1.7b-e4": (2048, 6144, 28, 16, 8, 128, 151936, 4, 2),
    "1.7b-e32-g8": (2048, 768, 28, 16, 8, 128, 151936, 32, 8),
    "0.6b-e8": (1024, 3072, 28, 16, 8, 128, 151936, 8, 2),
    "14b-e64-g8": (5120, 2176, 40, 40, 8, 128, 151936, 64, 8),
    "tiny": (64, 32, 2, 2, 1, 32, 512, 4, 2),   # to try these scripts, on a CPU too
}
FIELDS = ("hidden", "ffn", "layers", "heads", "kv_heads", "head_dim", "vocab", "experts", "top_k")
PEAKS = (("H100 PCIe", 756e12), ("H100", 989.4e12), ("H200", 989.4e12), ("A100", 312e12))   # bf16, dense; as src/model/flops.cpp
WATCHED = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "utilization.gpu", "memory.used")


def shape(model):
    return dict(zip(FIELDS, MODELS[model]))


def flops_per_token(of, sequence):
    """Forward and backward of one token: 6 per weight that it meets, and causal attention. As src/model/flops.cpp, term for term."""
    q, kv = of["heads"] * of["head_dim"], of["kv_heads"] * of["head_dim"]
    weights = of["layers"] * (of["hidden"] * (2 * q + 2 * kv) + of["top_k"] * 3 * of["hidden"] * of["ffn"]) + of["hidden"] * of["vocab"]
    return 6 * weights + 6 * of["layers"] * q * sequence


def peak_flops(name):
    return next((peak for part, peak in PEAKS if part in name), None)


def own_index():
    """Of the first GPU that this process sees, as nvidia-smi takes it."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"


def ask(query):
    try:
        done = subprocess.run(["nvidia-smi", "-i", own_index(), f"--query-gpu={query}", "--format=csv,noheader,nounits"], capture_output=True,
                              text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return [value.strip() for value in done.stdout.strip().split(",")] if done.returncode == 0 else None


def facts():
    """None without a GPU."""
    told = ask("name,driver_version,memory.total,power.limit,clocks.max.sm")
    return told and dict(zip(("name", "driver", "memory_mib", "power_limit_w", "max_sm_mhz"), told))


class Watch:
    """The GPU's clocks and power, four times a second, while it is busy; `seen` afterwards."""
    def __enter__(self):
        self.samples, self.process = [], None
        try:
            self.process = subprocess.Popen(["nvidia-smi", "-i", own_index(), f"--query-gpu={','.join(WATCHED)}", "--format=csv,noheader,nounits",
                                             "-lms", "250"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            return self
        self.reader = threading.Thread(target=self.read)
        self.reader.start()
        return self

    def read(self):
        for line in self.process.stdout:
            try:
                self.samples.append(dict(zip(WATCHED, map(float, line.split(",")))))
            except ValueError:   # "[N/A]", on some machines
                continue

    def __exit__(self, *error):
        if self.process:
            self.process.terminate()
            self.process.wait()
            self.reader.join()

    @property
    def seen(self):
        busy = [sample for sample in self.samples if sample["utilization.gpu"] >= 90]
        if not busy:
            return {}
        return {"sm_mhz": statistics.median(sample["clocks.sm"] for sample in busy), "sm_mhz_least": min(sample["clocks.sm"] for sample in busy),
                "memory_mhz": statistics.median(sample["clocks.mem"] for sample in busy),
                "watts": statistics.median(sample["power.draw"] for sample in busy),
                "celsius": max(sample["temperature.gpu"] for sample in busy), "samples": len(busy),
                "memory_used_mib": max(sample["memory.used"] for sample in self.samples)}


def python():
    """The Python that has torch: the one the program's launcher takes, or this one."""
    return os.environ.get("UPCYCLE_PYTHON", sys.executable)


def program(name):
    """An executable of ours: in a bundle, beside tools/; in a clone, of the newest build for CUDA."""
    for place in (common.ROOT / name, common.ROOT / "build/cuda" / name, common.ROOT / "build" / name):
        if place.is_file() and os.access(place, os.X_OK):
            return place
    return None
