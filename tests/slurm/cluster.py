"""A cluster of tools/slurm-lab, and jobs on it that are asked about by what Slurm, their logs and their runs say."""
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "tests/e2e"))
from tiny_run import CONFIG, MOE, TrainCase, make_dense, write_tokens   # noqa: E402, F401

NODES, RANKS_PER_NODE = 4, 2
FINAL_STATES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}


class Lab:
    """Up for the time of a `with`. Nodes have more fake GPUs and CPUs than one job takes, so that several jobs of four nodes run at once."""

    def __init__(self, program, scratch, accounting):
        self.program, self.scratch, self.accounting = Path(program).resolve(), Path(scratch), accounting
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "SBATCH_", "UPCYCLE_"))}
        self.environment["UPCYCLE_SLURM_LAB"] = str(self.scratch / "lab")

    def __enter__(self):
        # What is mounted in here later shows up on the nodes.
        subprocess.run(["mount", "--bind", self.scratch, self.scratch], check=True)
        subprocess.run(["mount", "--make-shared", self.scratch], check=True)
        try:
            self.tool("up", "--nodes", NODES, "--cpus", 32, "--gpus", 16, *(["--accounting"] if self.accounting else []), timeout=180)
        except BaseException:
            self.__exit__()
            raise
        self.environment["SLURM_CONF"] = str(self.scratch / "lab/etc/slurm.conf")
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", self.scratch / "slow.so", HERE / "slow.c"], check=True)
        self.source = make_dense(self.scratch / "source")
        return self

    def __exit__(self, *_):
        subprocess.run([ROOT / "tools/slurm-lab", "down"], env=self.environment, timeout=60)
        subprocess.run(["umount", "--lazy", self.scratch])

    def tool(self, *words, timeout=60):
        return self.ask(ROOT / "tools/slurm-lab", *words, timeout=timeout)

    def controller_log(self):
        return (self.scratch / "lab/log/slurmctld").read_text(errors="replace").splitlines()

    def ask(self, *words, environment=None, cwd=None, check=True, timeout=60):
        """What a command of Slurm's says on its standard output."""
        answer = subprocess.run([str(word) for word in words], env=environment or self.environment, cwd=cwd, capture_output=True, text=True,
                                timeout=timeout)
        if check and answer.returncode != 0:
            raise AssertionError(f"{' '.join(map(str, words))}: code {answer.returncode}: {answer.stdout}{answer.stderr}")
        return answer.stdout.strip() if check else answer


class Place:
    """A folder as a user has it: the batch scripts and configs of this clone, unchanged, a site.env, a run file."""

    def __init__(self, lab, name, slow_steps=0, slow_writes=0, site="", **run):
        self.lab, self.root, self.source, self.name = lab, lab.scratch / name, lab.source, name
        shutil.copytree(ROOT / "slurm", self.root / "slurm", ignore=shutil.ignore_patterns("site.env"))
        (self.root / "configs").symlink_to(ROOT / "configs")
        self.write_site(slow_steps, slow_writes, site)
        self.run_file, self.run = self.write_run(**run)

    def write_site(self, slow_steps=0, slow_writes=0, more=""):
        """From the example: its lines for sbatch and for the program are replaced, and this machine's are added."""
        text = (ROOT / "slurm/site.env.example").read_text()
        for line, instead in ((r"SBATCH_PARTITION=\w+", "SBATCH_PARTITION=low"), (r"SBATCH_GPUS_PER_NODE=\S+", f"SBATCH_GPUS_PER_NODE=h100:{RANKS_PER_NODE}"),
                              (r"SBATCH_CPUS_PER_GPU=\d+", "SBATCH_CPUS_PER_GPU=1"),
                              (r'# export UPCYCLE="apptainer.*', f'export UPCYCLE="env LD_PRELOAD={self.lab.scratch}/slow.so {self.lab.program}"')):
            text, found = re.subn(line, instead, text)
            assert found, f"site.env.example has no {line}"
        # Dozens of ranks start at once, on as few cores as there are.
        text += ('export UPCYCLE_CHECK="--wait 120"\n'
                 "export OMPI_MCA_mpi_yield_when_idle=1 OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMP_NUM_THREADS=1\n"
                 "ulimit -S -c $(ulimit -H -c)\n"   # run.py tells of cores
                 f"export SLOW_STEPS={slow_steps} SLOW_WRITES={slow_writes}\n{more}\n")
        (self.root / "slurm/site.env").write_text(text)

    def write_run(self, directory="run", steps=60, every=10, extra="", **train):
        """A batch of 24 sequences and expert = 2 fit 8 ranks on four nodes, and 6 on three."""
        return TrainCase.run_file(self, directory, MOE + f"[parallel]\nexpert = 2\n[checkpoint]\nevery = {every}\nkeep = 100\n{extra}", steps=steps,
                                  global_batch=24, **train)

    def shell(self, line, kind="gpu", check=True):
        """As a user types it, having read site.env."""
        return self.lab.ask("bash", "-c", f"if [[ -f slurm/site.env ]]; then source slurm/site.env {kind}; fi; {line}", cwd=self.root, check=check)

    def submit(self, *options, script="train", arguments=None, kind="gpu"):
        words = [*map(str, options), f"slurm/{script}.sbatch", *map(str, arguments if arguments is not None else [self.run_file.name])]
        return Job(self, self.shell("sbatch --parsable " + " ".join(f"'{word}'" for word in words), kind))

    def steps(self, run=None):
        """The steps in metrics.jsonl, of which the last line may be half written."""
        try:
            lines = ((run or self.run) / "metrics.jsonl").read_text().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        return [line for line in map(json.loads, (line for line in lines if line.endswith("\n"))) if line["kind"] == "step"]

    def losses(self, run=None):
        """Of the last time that each step was done, as the digits that the program wrote."""
        return {line["step"]: json.dumps(line["loss"]) for line in self.steps(run)}

    def checkpoints(self, run=None):
        return sorted(int(entry.name[5:]) for entry in ((run or self.run) / "checkpoints").glob("step-????????"))


class Job:
    def __init__(self, place, number, task=None):
        self.place, self.lab, self.number, self.task = place, place.lab, number, task
        self.id = number if task is None else f"{number}_{task}"

    def fields(self):
        """Of `scontrol show job`, which knows a job for an hour after its end."""
        return dict(re.findall(r"(\w+)=(\S*)", self.lab.ask("scontrol", "--oneliner", "show", "job", self.id)))

    def state(self):
        return self.fields()["JobState"]

    def restarts(self):
        return int(self.fields()["Restarts"])

    def log(self):
        paths = [*self.place.root.glob(f"*-{self.id}.out")]
        return paths[0].read_text(errors="replace") if paths else ""

    def exit_code(self):
        return self.fields()["ExitCode"]

    def wait(self, what, condition, seconds=240):
        """Until the condition holds; sooner, and a failure, when the job is over."""
        end = time.monotonic() + seconds
        while not condition():
            over = self.state() in FINAL_STATES
            if condition():
                return
            if over or time.monotonic() > end:
                raise AssertionError(f"{self.place.name}: job {self.id}: no {what}: {self.lab.ask('scontrol', 'show', 'job', self.id)}\n{self.log()}")
            time.sleep(0.2)

    @staticmethod
    def wait_until(condition, seconds):
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            time.sleep(0.2)

    def wait_for_step(self, step, seconds=240):
        """A step of the run that is at hand."""
        self.wait(f"step {step}", lambda: (self.place.steps() or [{"step": -1}])[-1]["step"] >= step, seconds)

    def wait_for_life(self, life, seconds=240):
        self.wait(f"life {life}", lambda: f"life {life}: " in self.log(), seconds)

    def ends(self, seconds=300):
        """Its final state. A job that goes back into the queue is not at its end."""
        end = time.monotonic() + seconds
        while True:
            fields = self.fields()
            if fields["JobState"] in FINAL_STATES:
                return fields["JobState"]
            if time.monotonic() > end:
                raise AssertionError(f"{self.place.name}: job {self.id} does not end: {fields}\n{self.log()}")
            time.sleep(0.5)

    def lives(self):
        """The states of all its lives, as sacct tells them, which hears of an end some seconds late; None without accounting."""
        if not self.lab.accounting:
            return None
        states = []
        for _ in range(20):
            states = self.lab.ask("sacct", "--duplicates", "--allocations", "--noheader", "--parsable2", "--format=State", f"--jobs={self.id}").splitlines()
            if states and states[-1].split()[0] in FINAL_STATES:
                break
            time.sleep(1)
        return states

    def signal(self, name, *options):
        self.lab.ask("scancel", f"--signal={name}", *options, self.id)

    def rank(self, rank):
        """The process id, seen from here, of a rank that trains."""
        for process in Path("/proc").iterdir():
            if not process.name.isdigit():
                continue
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
                if words[1:2] != [b"train"] or Path(os.fsdecode(words[0])).name != self.lab.program.name:
                    continue
                around = dict(entry.split(b"=", 1) for entry in (process / "environ").read_bytes().split(b"\0") if b"=" in entry)
            except OSError:
                continue
            if around.get(b"SLURM_JOB_ID") == self.number.encode() and around.get(b"SLURM_PROCID") == str(rank).encode():
                return int(process.name)
        raise AssertionError(f"{self.place.name}: job {self.id} has no rank {rank}:\n{self.log()}")
