"""What the parts of tools/bench share: the machine's description, tables, and processes whose memory is watched."""
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SAMPLE_SECONDS = 0.02


class Failed(Exception):
    """A measurement that can't be made; its text is for the user."""


def cores():
    return len(os.sched_getaffinity(0))


def environment(threads):
    """For the programs that are measured: OpenMP threads, and Open MPI's leave to run as root."""
    return os.environ | {"OMP_NUM_THREADS": str(threads), "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
                         "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def on_ranks(ranks, program, *words):
    """The command; one rank needs no launcher. More ranks than cores have to give way to each other. They may be a part of a Slurm job."""
    launcher = ["env", "-u", "SLURM_NTASKS", "mpirun", "--oversubscribe", "--bind-to", "none", "-np", str(ranks)] if ranks > 1 else []
    if ranks > cores():
        launcher += ["--mca", "mpi_yield_when_idle", "1"]
    return [*launcher, str(program), *map(str, words)]


def machine(upcycle):
    """What one must know to compare figures: processor, cores, memory, versions, and how busy the machine was at the start."""
    model = next((line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")),
                 platform.machine())
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    memory = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    version = subprocess.run([upcycle, "--version"], capture_output=True, text=True, env=environment(1))
    if version.returncode:
        raise Failed(f"{upcycle} --version: {version.stderr.strip()}")
    return {"processor": model, "cores": cores(), "memory_bytes": memory * 1024,
            "vector_units": [unit for unit in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {unit} " in flags + " "],
            "system": platform.platform(), "load_average": os.getloadavg(), "upcycle": str(upcycle), "commit": commit(),
            "libraries": {name: version_of(name) for name in ("torch", "transformers", "mergekit")},
            "upcycle_version": version.stdout.split("\n")[0]}


def commit():
    """Of this clone, or of the one that this bundle was packed from; empty where neither is known."""
    if (ROOT / "commit").is_file():
        return (ROOT / "commit").read_text().strip()
    try:
        return subprocess.run(["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def version_of(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe(facts):
    busy = facts["load_average"][0]
    lines = [f"{facts['processor']}, {facts['cores']} cores ({', '.join(facts['vector_units']) or 'no AVX2'}), "
             f"{facts['memory_bytes'] / 2**30:.0f} GiB; {facts['upcycle_version']} ({facts['commit']}), torch {facts['libraries']['torch']}, "
             f"transformers {facts['libraries']['transformers']}"]
    if busy > 0.3 * facts["cores"]:
        lines.append(f"NOTE: the machine is busy (load average {busy:.1f}); these figures are not for quoting")
    return "\n".join(lines)


def table(heads, rows):
    """Text in columns, numbers to the right."""
    cells = [heads, *[[str(cell) for cell in row] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(heads))]
    numeric = [all(row[column][:1].isdigit() or row[column] in ("", "-") for row in cells[1:]) for column in range(len(heads))]

    def line(row):
        return "  ".join(cell.rjust(width) if right else cell.ljust(width) for cell, width, right in zip(row, widths, numeric)).rstrip()

    return "\n".join([line(cells[0]), "  ".join("-" * width for width in widths), *map(line, cells[1:])])


def spread(values):
    """Half the distance between the largest and the smallest, as a share of the median."""
    return (max(values) - min(values)) / 2 / statistics.median(values)


@dataclass
class Finished:
    seconds: float
    memory_bytes: int   # most at any moment, over all of the processes: anonymous, and shared (once for each of them that has touched it)
    output: str


def run(command, env, cwd=None, watch=None):
    """Runs a command to its end. Memory is that of the processes below it (and itself) whose name starts with `watch`: what can't be
    read from a file again. Raises Failed with the end of its output."""
    start = time.monotonic()
    process = subprocess.Popen(list(map(str, command)), env=env, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak, done = [0], threading.Event()

    def sample():
        while not done.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], sum(memory_of(pid, watch) for pid in family(process.pid)))

    watcher = threading.Thread(target=sample)
    if watch:
        watcher.start()
    output = process.communicate()[0]
    seconds = time.monotonic() - start
    done.set()
    if watch:
        watcher.join()
    if process.returncode:
        raise Failed(f"{' '.join(map(str, command))}\nended with code {process.returncode}:\n{output[-3000:]}")
    return Finished(seconds, peak[0], output)


def family(pid):
    """A process and all below it."""
    yield pid
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from family(int(child))
    except OSError:
        return


def memory_of(pid, name):
    try:
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    except OSError:
        return 0
    if not status.get("Name", "").strip().startswith(name) or "RssAnon" not in status:
        return 0
    return sum(int(status[kind].split()[0]) for kind in ("RssAnon", "RssShmem")) * 1024


def say(text):
    print(text, file=sys.stderr, flush=True)
