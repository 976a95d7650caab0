"""What the batch scripts must survive, as CI runs it: stop, requeue and resume; preemption; a node that crashes in a checkpoint; a hang; a storm of
restarts; an array. Each test is a job of a user's, and asserts on what Slurm, the log and the run itself say."""
import os
import signal
import threading
import time
import unittest
from pathlib import Path

import numpy as np

from cluster import Job, Place, write_tokens

LAB = None   # set by run.py
QUICK_WATCH = 'export UPCYCLE_WATCH="--start 300 --step 25 --checkpoint 120"'   # longer than any step on a machine that does five jobs at once


class Scenario(unittest.TestCase):
    maxDiff = None
    _reference, _lock = None, threading.Lock()

    def place(self, **settings):
        return Place(LAB, type(self).__name__, **settings)

    @classmethod
    def reference(cls):
        """The losses of the same run on four nodes with two ranks each, which nobody disturbed; trained by whoever asks first."""
        with Scenario._lock:
            if Scenario._reference is None:
                place = Place(LAB, "Reference")
                job = place.submit("--nodes=4")
                state = job.ends()
                assert state == "COMPLETED" and job.restarts() == 0, job.log()
                Scenario._reference = place, job, place.losses()
            return Scenario._reference

    def undisturbed(self, place):
        """Every step was done, and every loss is bit for bit that of the undisturbed run."""
        self.assertEqual(place.losses(), self.reference()[2])

    def finished(self, place, job, restarts, seconds=400):
        self.assertEqual(job.ends(seconds), "COMPLETED", job.log())
        self.assertEqual(job.exit_code(), "0:0")
        self.assertEqual(job.restarts(), restarts, job.log())
        self.assertTrue((place.run / "finished").exists())
        self.assertIn("== done: step 60", job.log())
        if (lives := job.lives()) is not None:
            self.assertEqual(len(lives), restarts + 1)
            self.assertEqual(lives[-1], "COMPLETED")

    def said(self, job, *words):
        for word in words:
            self.assertIn(word, job.log())

    def once_each(self, place):
        """No step was lost to a stop: none was done twice."""
        steps = [line["step"] for line in place.steps()]
        self.assertEqual(steps, list(range(1, 61)))


class FourNodes(Scenario):
    """Trains over 4 nodes x 2 ranks."""

    def test(self):
        place, job, losses = self.reference()
        self.finished(place, job, restarts=0)
        self.assertEqual(sorted(losses), list(range(1, 61)))
        self.said(job, "8 ranks of 1 CPUs on n[1-4]", "8 ranks (data 8, expert 2)")


class Stop(Scenario):
    """Slurm's signal before the time limit: saved, requeued, resumed, with no step done twice and the loss of the undisturbed run."""

    def test(self):
        place = self.place(slow_steps=45)
        job = place.submit("--nodes=4", "--time=4", "--signal=B:USR2@120")   # comes one minute after the start, or two
        job.wait_for_step(1)
        job.wait("requeue", lambda: "back into the queue" in job.log())   # its state is SIGNALING for a moment
        self.said(job, "stopped on request after step", "code 75: back into the queue")
        place.write_site()   # the rest may be fast, and in one life
        LAB.ask("scontrol", "update", f"jobid={job.id}", "TimeLimit=30")
        self.finished(place, job, restarts=1)
        self.once_each(place)
        self.undisturbed(place)


class Preemption(Scenario):
    """A job of a higher partition takes the nodes: saved within the grace, back in the queue, resumed."""

    def test(self):
        place = self.place(slow_steps=10)
        job = place.submit("--nodes=4")
        job.wait_for_step(5)
        other = Job(place, place.shell("sbatch --parsable --partition=high --nodes=4 --gpus-per-node=h100:16 --output=other.out --wrap 'sleep 3'"))
        job.wait("other state", lambda: job.state() != "RUNNING")
        self.assertEqual(other.ends(), "COMPLETED")
        place.write_site()
        self.finished(place, job, restarts=1)
        self.once_each(place)
        self.undisturbed(place)


class CrashInCheckpoint(Scenario):
    """A node is switched off while a checkpoint is being written: Slurm requeues the job, which resumes from the one before. The node has kept
    what its daemon left behind, so that srun fails once."""

    def test(self):
        place = self.place(slow_writes=60)
        job = place.submit("--nodes=4")
        partial = place.run / "checkpoints/step-00000020.partial"
        job.wait("checkpoint in the making", partial.exists)
        LAB.tool("crash", "n3")
        self.assertEqual(place.checkpoints(), [0, 10])
        self.assertTrue(partial.exists(), "it was done before the crash")
        job.wait("requeue", lambda: job.state() == "PENDING")
        self.assertEqual(place.checkpoints(), [0, 10])
        place.write_site()
        LAB.tool("recover", "n3", "--keep-spool")
        self.finished(place, job, restarts=1)
        self.said(job, "NODE FAILURE", "no rank has begun: once more", "step-00000010")
        if lives := job.lives():
            self.assertEqual(lives[0], "NODE_FAIL")
        self.undisturbed(place)


class Hang(Scenario):
    """A rank stands still: the watch ends the step and names it, and the job starts once more."""

    def test(self):
        place = self.place(slow_steps=10, site=QUICK_WATCH)
        job = place.submit("--nodes=4")
        job.wait_for_step(13)
        os.kill(job.rank(5), signal.SIGSTOP)
        job.wait("end of the first life", lambda: job.state() != "RUNNING", seconds=120)
        place.write_site()
        self.finished(place, job, restarts=1)
        accusation = [line for line in job.log().splitlines() if "rank 5" in line and "n3" in line]
        self.assertTrue(accusation, job.log())
        self.undisturbed(place)


class Storm(Scenario):
    """A rank dies in every life before there is a newer checkpoint: three lives, and the job stays out of the queue."""

    def test(self):
        place = self.place(slow_steps=20, every=60)
        job = place.submit("--nodes=1")
        beat = place.run / "heartbeat/rank_00001"
        for life in range(4):
            job.wait_for_life(life)
            before = beat.read_text() if life else None
            job.wait("training", lambda: place.checkpoints() == [0] and beat.read_text() != before)
            os.kill(job.rank(1), signal.SIGKILL)
            if life < 3:
                job.wait("end of the life", lambda: job.state() != "RUNNING", seconds=120)
        self.assertEqual(job.ends(), "FAILED")
        self.assertEqual(job.restarts(), 3)
        self.said(job, "code 137: back into the queue", "no newer checkpoint than step-00000000 in three lives: not started again")
        self.assertEqual(place.checkpoints(), [0])
        time.sleep(8)   # a requeued job would wait for 5
        self.assertEqual(job.state(), "FAILED")


class Array(Scenario):
    """A sweep of four arms of which one fails: the others are done, one of them after it was stopped and requeued alone; the same line
    submitted again finishes the fourth."""

    def test(self):
        place = self.place(slow_steps=3)
        base, _ = place.write_run("base")
        data = place.root / "late"
        sweep = place.root / "sweep.toml"
        sweep.write_text(f'[sweep]\nbase = "{base}"\ndirectory = "{place.root}/sweep"\ncontrol = false\nranks = 2\n'
                         f'[[arms]]\ndata.train = [[[1.0, "{data}"]]]\n[[arms]]\noptimizer.lr = [1e-4, 2e-4, 3e-4]\n')
        line = dict(script="sweep", arguments=["sweep.toml"])
        arms = [Path(place.shell(f"{LAB.program} sweep sweep.toml --arm {arm} --run-file", kind="job")).with_suffix("") for arm in range(4)]
        array = place.submit("--array=0-3", "--nodes=1", **line)
        jobs = [Job(place, array.number, task) for task in range(4)]
        # The last element has the array's own number: it is the one that could take the others with it.
        jobs[3].wait("step 3", lambda: len(place.steps(arms[3])) >= 3)
        jobs[3].signal("USR2", "--batch")
        jobs[3].wait_for_life(1)
        place.write_site()
        self.assertEqual([job.ends(400) for job in jobs], ["FAILED", "COMPLETED", "COMPLETED", "COMPLETED"], "".join(job.log() for job in jobs))
        self.assertEqual([job.restarts() for job in jobs], [0, 0, 0, 1])
        self.assertEqual(jobs[0].exit_code(), "2:0")
        self.said(jobs[0], str(data), "nothing was started")
        finals = [place.losses(arm)[60] for arm in arms[1:]]
        self.assertEqual(len(set(finals)), 3, "three learning rates")

        write_tokens(data, [np.arange(4000) % 90])
        again = place.submit("--array=0-3", "--nodes=1", **line)
        jobs = [Job(place, again.number, task) for task in range(4)]
        self.assertEqual([job.ends(400) for job in jobs], ["COMPLETED"] * 4, "".join(job.log() for job in jobs))
        self.assertEqual(place.steps(arms[0])[-1]["step"], 60)
        self.assertEqual([len(place.steps(arm)) for arm in arms[1:]], [60] * 3, "arms that were done were trained again")
        self.assertEqual([place.losses(arm)[60] for arm in arms[1:]], finals)
