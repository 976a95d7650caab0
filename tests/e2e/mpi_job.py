"""Waiting for a job whose ranks were killed."""
import subprocess
from pathlib import Path

PATIENCE = 15   # seconds for mpirun to leave when its ranks have


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def output_of(job, pids, seconds=300):
    """Waits for the end of a job, `job` being mpirun with a pipe as its output; what it printed. `pids()`: of its ranks, as far as known.
    mpirun (Open MPI 4.1 with PMIx 4.2) at times never comes back from clearing up after a rank was killed: PMIx_server_finalize waits for a
    lock that nobody holds. Where all ranks are gone it is killed, and that is its exit code."""
    alone = 0
    for _ in range(seconds):
        try:
            return job.communicate(timeout=1)[0]
        except subprocess.TimeoutExpired:
            ranks = pids()
            alone = 0 if not ranks or any(map(running, ranks)) else alone + 1
        if alone == PATIENCE:
            job.kill()
    raise TimeoutError(f"after {seconds} s the job still runs, ranks {pids()}: {job.args}")
