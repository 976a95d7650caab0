"""The rest of what the batch scripts must survive: scancel, lost nodes, full disks, hands that meddle, limits that are too short, bad input."""
import json
import os
import re
import signal
import time

import numpy as np

from cluster import CONFIG, RANKS_PER_NODE, Job, Place, write_tokens
from scenarios import QUICK_WATCH, Scenario

LAB = None   # set by run.py


class More(Scenario):
    def place(self, name="", **settings):
        return Place(LAB, type(self).__name__ + name, **settings)

    def refused(self, job, *words, code="2:0", seconds=180):
        """A user's mistake: over soon, not started again, with the message in the log."""
        self.assertEqual(job.ends(seconds), "FAILED", job.log())
        self.assertEqual((job.exit_code(), job.restarts()), (code, 0), job.log())
        self.said(job, *words)


class Cancelled(More):
    """scancel ends the job for good, with a checkpoint of the step it was at; submitted again it goes on from there."""

    def test(self):
        place = self.place(slow_steps=10)
        job = place.submit("--nodes=4")
        job.wait_for_step(5)
        LAB.ask("scancel", job.id)
        self.assertEqual(job.ends(60), "CANCELLED")
        job.wait_until(lambda: "after TERM" in job.log(), 30)
        self.assertEqual(place.checkpoints()[-1], place.steps()[-1]["step"])
        self.assertLess(place.checkpoints()[-1], 60)
        time.sleep(8)
        self.assertEqual((job.state(), job.restarts()), ("CANCELLED", 0))
        place.write_site()
        self.finished(place, place.submit("--nodes=4"), restarts=0)
        self.once_each(place)
        self.undisturbed(place)


class CrashInStep(More):
    """A node is switched off while the ranks train, and does not come back: the job goes on with the three that are left."""

    def test(self):
        place = self.place(slow_steps=10)
        job = place.submit("--nodes=3-4")
        job.wait_for_step(13)
        LAB.tool("crash", "n2")
        try:
            job.wait("requeue", lambda: job.state() != "RUNNING")
            place.write_site()
            self.finished(place, job, restarts=1)
        finally:
            LAB.tool("recover", "n2")
        self.said(job, "8 ranks of 1 CPUs on n[1-4]", "6 ranks of 1 CPUs on n[1,3-4]", "step-00000010")
        losses, undisturbed = place.losses(), self.reference()[2]
        self.assertEqual(list(losses), list(undisturbed))
        for step in losses:
            # Sums over 6 ranks are rounded otherwise than those over 8.
            self.assertAlmostEqual(float(losses[step]), float(undisturbed[step]), delta=1e-4, msg=f"step {step}")


class FullDisk(More):
    """No room: refused by the check before anything is written. The room goes while it trains: it fails and says why, is not started again,
    and with room it goes on as if nothing had been."""

    def test(self):
        place = self.place(slow_steps=10)
        disk = place.root / "disk"
        disk.mkdir()
        LAB.ask("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk)
        try:
            ballast = disk / "ballast"
            place.run = disk / "run"
            line = dict(arguments=[place.run_file.name, "--set", f"run.directory={place.run}"])
            self.fill(ballast, disk)
            self.refused(place.submit("--nodes=4", **line), str(disk))
            ballast.unlink()
            job = place.submit("--nodes=4", **line)
            job.wait_for_step(5)
            self.fill(ballast, disk)
            self.assertEqual(job.ends(), "FAILED", job.log())
            self.assertEqual(job.restarts(), 0)
            self.assertRegex(job.log(), f"upcycle: .*{disk}.*(disk full|No space left on device)")
            self.assertEqual(place.checkpoints(), [0])
            ballast.unlink()
            place.write_site()
            again = place.submit("--nodes=4", **line)
            self.finished(place, again, restarts=0)
            self.undisturbed(place)
        finally:
            LAB.ask("umount", "--lazy", disk)

    @staticmethod
    def fill(ballast, disk):
        room = os.statvfs(disk)
        ballast.write_bytes(bytes(room.f_bavail * room.f_frsize))


class ShortLimit(More):
    """A time limit in which no checkpoint can be written, by the disk's speed: refused by the check, with both numbers. One that only turns out to
    be too short: the job ends as Slurm says, nothing half is taken for a checkpoint, and a longer limit is all it takes."""

    def test(self):
        place = self.place(slow_writes=12000)
        wide = place.root / "wide.json"
        wide.write_text(json.dumps(CONFIG | dict(vocab_size=1_000_000)))   # 400 MB a checkpoint, at less than 1 MB/s
        wide_file, wide_run = place.write_run("wide", source=f'architecture = "{wide}"')
        self.refused(place.submit("--nodes=1", "--time=2", arguments=[wide_file.name]), "the time limit is shorter than a save: a checkpoint (", "GB/s of all nodes",
                     "give it more time (sbatch --time)", "nothing was started", seconds=110)
        self.assertFalse(wide_run.exists())
        job = place.submit("--nodes=1", "--time=2", "--signal=B:USR2@5")
        self.assertEqual(job.ends(), "TIMEOUT", job.log())
        self.assertEqual(job.restarts(), 0)
        self.assertEqual(place.checkpoints(), [])
        self.assertTrue((place.run / "checkpoints/step-00000000.partial").exists())
        place.write_site()
        again = place.submit("--nodes=1", "--time=10")
        self.finished(place, again, restarts=0)


class HangTwice(More):
    """A rank stands still in two lives, between which the run gets on: the second hang is the last."""

    def test(self):
        place = self.place(slow_steps=10, site=QUICK_WATCH)
        job = place.submit("--nodes=1")
        for life, step in enumerate((13, 23)):
            job.wait_for_life(life)
            job.wait_for_step(step)
            os.kill(job.rank(1), signal.SIGSTOP)
            if life == 0:
                job.wait("end of the first life", lambda: job.state() != "RUNNING", seconds=120)
        self.assertEqual(job.ends(120), "FAILED", job.log())
        self.assertEqual((job.exit_code(), job.restarts()), ("1:0", 1))
        self.assertEqual(place.checkpoints(), [0, 10, 20])
        self.said(job, "a second hang: not started again")
        self.assertEqual(len([line for line in job.log().splitlines() if line.startswith("upcycle watch: ") and "rank 1 (" in line]), 2, job.log())
        time.sleep(8)   # a requeued job would wait for 5
        self.assertEqual(job.state(), "FAILED")


class NoScontrol(More):
    """scontrol is missing on the nodes: stopped and saved, the job says what to submit, and that very line goes on."""

    def test(self):
        missing = "scontrol() { command no-scontrol-here; }"
        place = self.place(slow_steps=6, site=missing)
        job = place.submit("--nodes=1", arguments=[place.run_file.name, "--set", 'data.train=[[1.0, "mock"]]'])
        job.wait_for_step(3)
        place.write_site(more=missing)
        job.signal("USR2", "--batch")
        self.assertEqual(job.ends(60), "FAILED", job.log())
        self.assertEqual((job.exit_code(), job.restarts()), ("75:0", 0), job.log())
        self.said(job, "no-scontrol-here: command not found", "saved, but not back in the queue")
        line = re.search(r"submit it again: (sbatch .*)", job.log())[1]
        again = Job(place, re.search(r"Submitted batch job (\d+)", place.shell(line))[1])
        self.finished(place, again, restarts=0)
        self.once_each(place)


class AbsentRank(More):
    """A rank never comes to the check, as on a node whose file system hangs: it and its node are named, each time, and nothing is started."""

    def test(self):
        place = self.place()
        stops = place.root / "stops.sh"
        stops.write_text('[[ $1 != check || ${SLURM_PROCID:-} != 5 || -z ${SLURM_STEP_NUM_TASKS:-} ]] || kill -STOP $$\n' f'exec {LAB.program} "$@"\n')
        place.write_site(more=f'export UPCYCLE="bash {stops}" UPCYCLE_CHECK="--wait 25"')
        job = place.submit("--nodes=4")
        self.assertEqual(job.ends(180), "FAILED", job.log())
        self.assertEqual(job.restarts(), 0)
        self.said(job, f"1 of 8 ranks has not come within 25 s, nor answered in {place.root}: rank 5 (node n3)", "once more",
                  "the pre-flight check could not run, three times", "nothing was started")
        self.assertFalse(place.run.exists())
        self.assertEqual([*place.root.glob(".upcycle-check*")], [])


class Switches(More):
    """A file `save`: a checkpoint at the next step. A file `stop`: saved, and not started again until it is removed."""

    def test(self):
        place = self.place(slow_steps=4)
        job = place.submit("--nodes=1")
        job.wait_for_step(2)
        (place.run / "save").touch()
        job.wait("checkpoint", lambda: len(place.checkpoints()) > 1)
        self.assertNotEqual(place.checkpoints()[1] % 10, 0)
        job.wait("end of the request", lambda: not (place.run / "save").exists())
        (place.run / "stop").touch()
        self.refused(job, "stop is there: not started again", code="75:0")
        self.assertEqual(place.checkpoints()[-1], place.steps()[-1]["step"])
        self.refused(place.submit("--nodes=1"), "stop is there, which stops this run: remove it", "nothing was started")
        (place.run / "stop").unlink()
        place.write_site()
        self.finished(place, place.submit("--nodes=1"), restarts=0)
        self.once_each(place)


class ByHand(More):
    """`scontrol requeue` by hand, in the middle of training."""

    def test(self):
        place = self.place(slow_steps=10)
        job = place.submit("--nodes=4")
        job.wait_for_step(13)
        LAB.ask("scontrol", "requeue", job.id)
        place.write_site()
        job.wait_for_life(1)
        self.finished(place, job, restarts=1)
        self.undisturbed(place)


class Chain(More):
    """Where requeueing is not wanted: the next job is in the queue from the start, goes on when this one was stopped, and is taken out of it
    when the run is done."""

    def test(self):
        place = self.place(slow_steps=4, site="export UPCYCLE_RESTART=chain")
        job = place.submit("--nodes=1", "--job-name=chained")
        job.wait_for_step(3)
        place.write_site(more="export UPCYCLE_RESTART=chain")
        job.signal("USR2", "--batch")
        self.assertEqual(job.ends(), "FAILED")
        self.assertEqual((job.exit_code(), job.restarts()), ("75:0", 0))
        following = Job(place, re.search(r"code 75: job (\d+) goes on", job.log())[1])
        self.finished(place, following, restarts=0)
        self.said(following, f"job {following.id}, life 1: ")
        self.once_each(place)
        time.sleep(2)
        self.assertEqual(LAB.ask("squeue", "--noheader", "--name=chained"), "", "a job of the chain is left over")


class Mpirun(More):
    """mpirun instead of srun, over two nodes: stopped by Slurm's signal, requeued, resumed."""

    def test(self):
        place = self.place(slow_steps=6, site="export UPCYCLE_LAUNCHER=mpirun")
        job = place.submit("--nodes=2")
        job.wait_for_step(3)
        place.write_site(more="export UPCYCLE_LAUNCHER=mpirun")
        job.signal("USR2", "--batch")
        self.finished(place, job, restarts=1)
        self.said(job, "4 ranks (data 4, expert 2)")
        self.once_each(place)
        # By hand on another number of ranks than the job has tasks: an error of train and check alone.
        script = place.root / "part.sh"
        script.write_text("#!/bin/bash\nsource slurm/site.env job\n"
                          "for ranks in 2 4; do mpirun --bind-to none -np $ranks $UPCYCLE check run.toml; echo \"check on $ranks: code $?\"; done\n"
                          "mpirun --bind-to none -np 2 $UPCYCLE verify run; echo \"verify on 2: code $?\"\n"
                          "$UPCYCLE check run.toml --set parallel.expert=1; echo \"check on 1: code $?\"\n")
        part = Job(place, place.shell("sbatch --parsable --nodes=2 --ntasks-per-node=2 --output=part-%j.out part.sh"))
        self.assertEqual(part.ends(), "COMPLETED", part.log())
        self.said(part, "mpirun started 2 ranks, but this Slurm job has 4 tasks (SLURM_NTASKS = 4)", "check on 2: code 2", "check on 4: code 0", "verify on 2: code 0",
                  "check on 1: code 0")


class WrongMpi(More):
    """srun with a PMI that this MPI does not speak: an error within a minute, and not two runs of one rank each."""

    def test(self):
        for mpi in ("pmi2", "none"):
            place = self.place(mpi, site=f"export UPCYCLE_MPI={mpi}")
            job = place.submit("--nodes=1")
            self.assertEqual(job.ends(90), "FAILED", job.log())
            self.assertEqual(job.restarts(), 0)
            self.assertFalse(place.run.exists(), "something was begun")


class TwoJobs(More):
    """Two jobs on one run directory: the second is refused and names the first, which does not notice."""

    def test(self):
        place = self.place(slow_steps=4)
        first = place.submit("--nodes=1")
        first.wait_for_step(2)
        second = place.submit("--nodes=1", "--job-name=second")
        self.refused(second, "another job runs in this directory", f"job {first.id}")
        self.finished(place, first, restarts=0)
        self.once_each(place)


class Example(More):
    """The two published examples, with a tiny model in place of theirs."""

    def test(self):
        place = self.place()
        write_tokens(place.root / "data", [np.arange(7000) % 90])
        tiny = ["source.architecture=", "run.device=cpu", "train.sequence=16", "train.steps=3", "optimizer.warmup=1", "train.precision=fp32", "validate.every=0",
                "parallel.pipeline=1", "parallel.expert=2", "checkpoint.every=3", "checkpoint.keep_best=false"]
        jobs = {}
        for name in ("qwen3-1.7b-4e", "qwen3-14b-64e"):
            words = [place.source, place.source, place.root / "data", place.root / name, "--set", *tiny]
            jobs[name] = place.submit("--nodes=1", script=name, arguments=words)
        for name, job in jobs.items():
            self.assertEqual(job.ends(), "COMPLETED", job.log())
            self.assertEqual(place.checkpoints(place.root / name)[-1], 3)
        self.refused(place.submit("--nodes=1", script="qwen3-1.7b-4e", arguments=["a", "b"]), "SOURCE TOKENIZER DATA RUN_DIRECTORY")


class Convert(More):
    """convert.sbatch and cpu.sbatch, on tasks instead of GPUs."""

    def test(self):
        place = self.place()
        # Three tasks, on which this run (expert = 2) could not train.
        job = place.submit("--ntasks-per-node=3", "--cpus-per-task=1", script="convert", kind="cpu")
        self.assertEqual(job.ends(), "COMPLETED", job.log())
        self.assertEqual(place.checkpoints(), [0])
        job = place.submit("--ntasks-per-node=2", "--cpus-per-task=1", "--nodes=2", script="cpu", kind="cpu")
        self.finished(place, job, restarts=0)
        self.said(job, "4 ranks of 1 CPUs")


class BadInput(More):
    """Mistakes end the job within seconds, before srun, with the message in its log."""

    def test(self):
        place = self.place()
        (place.root / "invalid.toml").write_text("[train]\nsteps = true\n")
        missing, invalid = (place.submit("--nodes=1", arguments=[name]) for name in ("missing.toml", "invalid.toml"))
        (place.root / "sweep.toml").write_text(f'[sweep]\nbase = "{place.run_file}"\ndirectory = "{place.root}/sweep"\nranks = 2\n'
                                               "[[arms]]\noptimizer.lr = [1e-4, 2e-4]\n")
        outside = place.submit("--nodes=1", "--array=7", script="sweep", arguments=["sweep.toml"])
        first = place.submit("--nodes=1")
        tasks = place.submit("--nodes=1", "--ntasks-per-node=3", arguments=[place.run_file.name, "--set", "run.device=cuda"])
        self.refused(missing, "missing.toml", "nothing was started")
        self.refused(tasks, f"there are more tasks than GPUs: 3 tasks on 1 node of {RANKS_PER_NODE} GPUs", "nothing was started")
        self.refused(invalid, "train.steps", "nothing was started")
        self.refused(Job(place, outside.number, 7), "--arm 7", "0 to 2")
        self.finished(place, first, restarts=0)
        others, _ = place.write_run("others", extra="[upcycle]\nrouter_logit_std = 0.5\n")
        other = place.submit("--nodes=1", arguments=[others.name, "--set", f"run.directory={place.run}"])
        self.refused(other, str(place.run))
        # No site.env: the log says so, and the program is the clone's.
        (place.root / "slurm/site.env").unlink()
        (place.root / "build").mkdir()
        (place.root / "build/upcycle").symlink_to(LAB.program)
        plain, run = place.write_run("plain", steps=2)
        job = place.submit("--gpus-per-node=2", "--cpus-per-gpu=1", arguments=[plain.name])
        self.assertEqual(job.ends(), "COMPLETED", job.log())
        self.said(job, "no slurm/site.env")
