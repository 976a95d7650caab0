"""Jobs of several ranks on one machine: how they are started, and how they end."""
import os
import signal
import socket
import subprocess
from pathlib import Path

from benchmarks import common

# NVLink multicast stays off: a program that fails in it can take all of a host's GPUs out of service.
QUIET = {"NCCL_NVLS_ENABLE": "0"}
# For ranks that share a GPU, which NCCL refuses unless it believes in different hosts; see Mesh::prepare. To try scripts, not for figures.
SHARED = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_IB_DISABLE": "1"}
AS_OWN_HOST = 'NCCL_HOSTID=rank$OMPI_COMM_WORLD_RANK exec "$0" "$@"'


def command(ranks, share_gpu, program, *words):
    own_host = ["sh", "-c", AS_OWN_HOST] if share_gpu and ranks > 1 else []
    return common.on_ranks(ranks, *own_host, program, *words) if own_host else common.on_ranks(ranks, program, *words)


def environment(ranks, share_gpu=False):
    return common.environment(max(1, common.cores() // ranks)) | QUIET | (SHARED if share_gpu else {})


def free_port():
    with socket.socket() as any_port:
        any_port.bind(("127.0.0.1", 0))
        return any_port.getsockname()[1]


def end(process):
    """Kills a job. The ranks first: mpirun puts each into a process group of its own, which dies with nobody, and clears up behind them."""
    family = [*common.family(process.pid)]
    for pid in family[1:] if Path(f"/proc/{process.pid}/comm").read_text().startswith(("mpirun", "orterun")) else family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def finish(words, env, seconds):
    """Runs a job to its end, or for so many seconds; what it printed. Raises Failed with the end of that."""
    process = subprocess.Popen(list(map(str, words)), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        said = process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        end(process)
        raise common.Failed(f"{' '.join(map(str, words))}\nnot done after {seconds} s") from None
    except BaseException:
        end(process)
        raise
    if process.returncode:
        raise common.Failed(f"{' '.join(map(str, words))}\nended with code {process.returncode}:\n{said[-3000:]}")
    return said


def why(error):
    """One line of a failed job's output: what the first rank to speak said."""
    text = str(error)
    if "out of memory" in text:
        return "out of memory"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    for number, line in enumerate(lines):
        if line.startswith(("upcycle: ", "collectives: ")):   # and what follows a colon
            return (line.split(": ", 1)[1] + (" " + lines[number + 1] if line.endswith(":") and number + 1 < len(lines) else ""))[:250]
    own = lines[:next((number for number, line in enumerate(lines) if line.startswith("-----")), len(lines))]   # then mpirun speaks
    return (own or lines or ["without a word"])[-1][:250]
