#!/usr/bin/env python3
"""What a job script has to do with: the files `finished`, `save` and `stop` of a run directory, `upcycle watch`, `upcycle check`, the lock of
a directory across hosts, and who is slow. Hosts are UTS namespaces where root may make them.
Usage: cluster.py UPCYCLE [unittest arguments]"""
import json
import os
import signal
import socket
import subprocess
import sys
import time
import unittest
from pathlib import Path

import tiny_run
from rank_server import served
from tiny_run import CONFIG, MOE, MPIRUN, TrainCase, checkpoint, steps_of

HOST = socket.gethostname()
HOSTS = subprocess.run(["unshare", "--uts", "true"], capture_output=True).returncode == 0   # whether processes can have host names of their own


def on_host(name, *command):
    return ["unshare", "--uts", "sh", "-c", 'hostname "$1"; shift; exec "$@"', "sh", name, *map(str, command)]


class Cluster(TrainCase):
    def until(self, what, seconds=20):
        deadline = time.monotonic() + seconds
        while not what():
            self.assertLess(time.monotonic(), deadline, "it does not come about")
            time.sleep(0.02)

    def background(self, command):
        job = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.root)
        self.addCleanup(lambda: (job.poll() is None and job.kill(), job.wait(), job.stdout.close()))
        return job


class Files(Cluster):
    def test_save_now_stop_and_finished(self):
        for asynchronous in ("false", "true"):
            path, run = self.run_file(f"run-{asynchronous}", f"{MOE}[checkpoint]\nevery = 100000\nasynchronous = {asynchronous}\n", steps=100000)
            job = self.start("train", path, run=run, ranks=2, after=3)
            before = steps_of(run)[-1]["step"]
            (run / "save").touch()
            self.until(lambda: not (run / "save").exists())
            saved = [int(entry.name.removeprefix("step-")) for entry in (run / "checkpoints").glob("step-????????")]
            self.assertEqual(len(saved), 2, "step 0, and the one that was asked for")
            self.assertGreaterEqual(max(saved), before)
            self.assertIn("good", self.upcycle("verify", checkpoint(run, max(saved))))
            (run / "stop").touch()
            said = self.finish(job, 75)
            self.assertIn(f"{run}/save is there: saving", said)
            self.assertIn(f"{run}/stop is there: saving, and leaving", said)
            self.assertEqual(said.count("saved "), 3, said)
        self.assertTrue((run / "stop").exists())
        self.assertFalse((run / "finished").exists())
        self.refused("train", path, ranks=2, words=[f"{run}/stop is there", "remove it"])
        (run / "stop").unlink()
        done = steps_of(run)[-1]["step"]
        self.upcycle("train", path, "--set", f"train.steps={done + 3}", "--accept-changes", ranks=2)
        self.assertEqual((run / "finished").read_text(), f"step {done + 3}\n")
        self.upcycle("train", path, "--set", f"train.steps={done + 3}", "--accept-changes")   # nothing to do
        self.assertEqual((run / "finished").read_text(), f"step {done + 3}\n")
        job = self.start("train", path, "--accept-changes", run=run, after=2)
        self.assertFalse((run / "finished").exists(), "it has more steps to do")
        (run / "save").touch(), (run / "stop").touch()   # both at once: one checkpoint
        self.assertEqual(self.finish(job, 75).count("saved "), 1)
        self.assertFalse((run / "save").exists())

    def test_a_run_without_steps_is_finished_and_a_fresh_directory_may_be_asked(self):
        path, run = self.run_file("run", MOE + "[upcycle]\ncertify = false\n", steps=0)
        self.upcycle("train", path)
        self.assertEqual((run / "finished").read_text(), "step 0\n")
        path, run = self.run_file("other", MOE)
        run.mkdir()
        (run / "stop").touch()
        self.refused("train", path, words=["other/stop is there"])
        (run / "stop").unlink(), (run / "save").touch()
        self.upcycle("train", path)
        self.assertFalse((run / "save").exists())
        self.assertEqual(len(list((run / "checkpoints").iterdir())), 3, "step 0, the one that was asked for, and the last")


class Watch(Cluster):
    def watch(self, run, **limits):
        options = [word for name, limit in ({"start": 60, "step": 60, "checkpoint": 60} | limits).items() for word in (f"--{name}", limit)]
        return self.background([tiny_run.UPCYCLE, "watch", run, *options])

    def test_a_stopped_rank_is_named(self):
        path, run = self.run_file("run", MOE, steps=1000000, global_batch=6)
        watch = self.watch(run, step=4)   # before there is a directory
        job = self.start("train", path, run=run, ranks=3, after=5)
        self.assertIsNone(watch.poll())
        victim = self.ranks_of(job)[1]
        os.kill(victim, signal.SIGSTOP)
        stopped = time.monotonic()
        said = self.finish(watch, 1)
        self.assertLess(time.monotonic() - stopped, 10)
        self.assertIn(f"upcycle watch: {run}: no step for more than 4 s (--step): a process is stopped: rank 1 ({HOST}, pid {victim}, step ", said)
        self.assertEqual(said.count("\n"), 1, said)

        os.kill(victim, signal.SIGCONT)   # the run goes on: the watch ends nothing
        watch = self.watch(run)
        time.sleep(1)
        job.send_signal(signal.SIGUSR2)
        self.finish(job, 75)
        self.assertIn("the run has left at step ", self.finish(watch, 0))

        watch = self.watch(run, step=3)   # the three heartbeats of the first start lie there
        self.assertIsNone(watch.poll())
        done = steps_of(run)[-1]["step"]
        self.upcycle("train", path, "--set", f"train.steps={done + 5}", "--accept-changes")
        self.assertIn(f"the run has left at step {done + 5}", self.finish(watch, 0))

    def test_a_run_that_does_not_begin(self):
        said = self.finish(self.watch(self.root / "nowhere", start=1), 1)
        self.assertIn("nowhere: no rank has begun within 1 s (--start)", said)
        self.assertIn("--step x: a positive number of seconds is expected", self.upcycle("watch", "run", "--step", "x", expect=2))
        (self.root / "file").touch()
        self.assertIn("file is not a directory", self.upcycle("watch", self.root / "file", expect=2))


class Check(Cluster):
    def here(self, *arguments, **environment):
        """`check` as a batch shell calls it: exit code and what it says."""
        program = tiny_run.UPCYCLE if "LD_PRELOAD" in environment else served(tiny_run.UPCYCLE)
        result = subprocess.run([program, "check", *map(str, arguments)], capture_output=True, text=True, cwd=self.root, env=os.environ | environment)
        return result.returncode, result.stdout + result.stderr

    def of_hosts(self, *ranks, expect, around=()):
        """`check`, started by the command `around` if there is one, on a host for each of `ranks`: (name, options of mpirun, arguments)."""
        line = [*MPIRUN]
        for i, (host, options, arguments) in enumerate(ranks):
            line += [*([":"] if i else []), "-np", "1", *map(str, options), *on_host(host, *around, tiny_run.UPCYCLE, "check", *arguments)]
        result = subprocess.run(line, capture_output=True, text=True, timeout=60, cwd=self.root)
        self.assertEqual(result.returncode, expect, result.stdout + result.stderr)
        return result.stdout + result.stderr

    def test_from_the_job_script(self):
        path, run = self.run_file("run", MOE + "[parallel]\nexpert = 2\n")
        self.assertEqual(self.here(path, "--print", "run.directory"), (0, f"{run}\n"))
        self.assertEqual(self.here(path, "--print", "train.steps", "--set", "train.steps=77"), (0, "77\n"))
        self.assertEqual(self.here(path, "--print", "data.train", "--json"), (0, '"mock"\n'))
        self.assertIn("did you mean 'run.directory'", self.here(path, "--print", "run.directry")[1])
        before = self.tree()
        self.assertEqual(self.here(path, "--files-only"), (0, ""))
        self.assertEqual(self.here(path, "--files-only", SLURM_NTASKS="4", SLURM_PROCID="0"), (0, ""))
        self.assertEqual(self.tree(), before)
        for arguments, environment, words in (
                (["--set", "source.model=absent"], {}, "absent"), (["--set", 'data.train=[[1.0, "absent"]]'], {}, "absent.idx"),
                (["--set", "train.stps=3"], {}, "did you mean"), ([], {"SLURM_NTASKS": "3"}, "does not divide on 3 ranks"),
                (["--set", f"run.directory={path}"], {}, "is not a directory"), (["--set", f"run.directory={self.source}"], {}, "it is not a run's directory"),
                (["--bandwidth-floor", "3"], {}, "give one of them")):
            code, said = self.here(path, "--files-only", *arguments, **environment)
            self.assertEqual((code, said.count("upcycle: ")), (2, 1), said)
            self.assertIn(words, said)
        self.assertEqual(self.tree(), before)

    def test_one_node(self):
        path, run = self.run_file("run", MOE + "[parallel]\nexpert = 2\n")
        begin = time.monotonic()
        before = self.tree()
        said = self.upcycle("check", path, ranks=2)
        self.assertEqual(self.tree(), before)
        self.assertLess(time.monotonic() - begin, 30)
        for word in ("2 ranks on 1 node; layout: ", "expert 2", HOST, "all-reduce over all ranks, by MPI", "checkpoints: 2 at once at most", "ready"):
            self.assertIn(word, said)
        report = json.loads(subprocess.run(self.command("check", path, "--json", ranks=2), capture_output=True, text=True, cwd=self.root).stdout)
        self.assertEqual([node["ranks"] for node in report["nodes"]], [[0, 1]])
        self.assertEqual(report["ranks"][0]["cpus"], sorted(os.sched_getaffinity(0)))
        self.assertGreater(report["nodes"][0]["disk_gb_per_second"], 0.001)
        self.assertGreater(report["all_reduce_gb_per_second"], 0.001)

        self.assertIn("the run does not divide on 3 ranks", self.upcycle("check", path, ranks=3, expect=2))
        # A model whose checkpoints no disk here could hold.
        (self.root / "giant.json").write_text(json.dumps(CONFIG | dict(hidden_size=16384, num_hidden_layers=200, num_attention_heads=128, head_dim=128,
                                                                       intermediate_size=65536, vocab_size=100000)))
        giant, _ = self.run_file("giant", source=f'architecture = "{self.root}/giant.json"')
        said = self.upcycle("check", giant, "--set", "moe.max_parameters=1e15", ranks=2, expect=2)
        self.assertIn("giant.toml can't be started here:", said)
        self.assertIn("free some space", said)
        self.assertIn("GB free", said)
        # The disk fails while it is measured; the file size limit stands for a full one.
        said = subprocess.run([*MPIRUN, "-np", "2", "sh", "-c", 'ulimit -f 100; exec "$@"', "sh", tiny_run.UPCYCLE, "check", path], capture_output=True, text=True, cwd=self.root)
        self.assertEqual(said.returncode, 2, said)
        self.assertIn(f"writing {self.root}: File too large", said.stderr)
        self.assertEqual([entry for entry in self.root.iterdir() if "check" in entry.name], [])

    def test_more_ranks_than_the_launcher_started(self):
        path, _ = self.run_file("run", MOE)
        for variable in ("OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
            code, said = self.here(path, **{variable: "4"})
            self.assertEqual(code, 2, said)
            self.assertIn(f"the launcher started 4 ranks ({variable} = 4), but MPI sees 1", said)

    @unittest.skipUnless(HOSTS, "needs UTS namespaces")
    def test_several_nodes(self):
        path, _ = self.run_file("run", MOE, global_batch=6)
        said = self.of_hosts(*[(host, [], [path, "--json"]) for host in ("n1", "n2", "n3")], expect=0)
        report = json.loads(said[said.index("{"):said.rindex("}") + 1])
        self.assertEqual([node["host"] for node in report["nodes"]], ["n1", "n2", "n3"])
        self.assertEqual(sorted(pair["nodes"] for pair in report["pairs"]), [["n1", "n2"], ["n2", "n3"], ["n3", "n1"]])
        self.assertTrue(all(node["link_gb_per_second"] > 0.001 for node in report["nodes"]))

        said = self.of_hosts(*[(host, [], [path, "--bandwidth-floor", "100000"]) for host in ("n1", "n2")], expect=2)
        for host in ("n1", "n2"):
            self.assertRegex(said, rf"node {host}: [0-9.]+ GB/s to the better of its neighbours, by MPI, is under --bandwidth-floor 100000: leave it out \(sbatch --exclude={host}\)")
        self.assertEqual(said.count("upcycle: "), 1, said)

        # What is there on one node only.
        for place in "ab":
            (self.root / place).mkdir()
        relative, _ = self.run_file("relative", MOE, source='model = "model"')
        (self.root / "a/model").symlink_to(self.source)
        on = [("n1", ["-wdir", self.root / "a"], [relative]), ("n2", ["-wdir", self.root / "b"], [relative])]
        said = self.of_hosts(*on, expect=2)
        self.assertRegex(said, "node n2: .*model")
        self.assertNotIn("node n1: ", said)
        (self.root / "b/model").symlink_to(self.source)
        self.of_hosts(*on, expect=0)
        said = self.of_hosts(*[(host, options, [relative, "--set", "run.directory=run"]) for host, options, _ in on], expect=2)
        self.assertIn("node n2: run.directory = run is not the same directory here and on n1", said)


    @unittest.skipUnless(HOSTS, "needs UTS namespaces")
    def test_a_rank_that_does_not_come_is_named(self):
        """It stands still before MPI, and between MPI's start and the first word with the others; all others leave, and nothing stays behind."""
        path, _ = self.run_file("run", MOE, global_batch=6)
        before = self.tree()
        early = self.scratch("early.sh", '[ "$OMPI_COMM_WORLD_RANK" != "$STOPS" ] || kill -STOP $$\nexec "$@"\n')
        library = self.root.parent / f"{self.root.name}.so"
        self.addCleanup(library.unlink)
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, Path(__file__).parent / "stop_before_dup.c"], check=True)
        slurm = ["env", "SLURM_STEP_NODELIST=n[1-3]", "SLURM_STEP_TASKS_PER_NODE=1(x3)"]
        for rank, around, words in ((1, [*slurm, "STOPS=1", "sh", early], "rank 1 (node n2)"), (0, [*slurm, "STOPS=0", "sh", early], "rank 0 (node n1)"),
                                    (2, ["env", "STOPS=2", f"LD_PRELOAD={library}"], "rank 2; the others are on n1 and n2")):
            with self.subTest(rank=rank):
                begin = time.monotonic()
                said = self.of_hosts(*[(host, [], [path, "--wait", 6]) for host in ("n1", "n2", "n3")], expect=1, around=around)
                self.assertLess(time.monotonic() - begin, 25)
                self.assertIn(f"upcycle: 1 of 3 ranks has not come within 6 s, nor answered in {self.root}: {words}. Leave their nodes out", said)
                self.assertEqual(said.count("upcycle: "), 1, said)
                self.assertEqual(self.tree(), before)
        # A run file that can't be read: there is no place to answer in.
        said = self.of_hosts(*[(host, [], ["absent.toml", "--wait", 3]) for host in ("n1", "n2")], expect=1, around=["env", "STOPS=1", "sh", early])
        self.assertIn("rank 0 (node n1) has waited 3 s for other ranks", said)

    def scratch(self, name, content):
        """A file outside of what the tests look at."""
        path = self.root.parent / f"{self.root.name}.{name}"
        path.write_text(content)
        self.addCleanup(path.unlink)
        return path

    def test_a_time_limit_shorter_than_a_save(self):
        path, _ = self.run_file("run", MOE)

        def check(*arguments, seconds=3600, **environment):
            return self.here(*arguments, **environment, SLURM_JOB_END_TIME=str(int(time.time()) + seconds))

        code, said = check(path, "--save-within", 180, "--json")
        report = json.loads(said)
        self.assertEqual(code, 0)
        self.assertTrue(3500 < report["seconds_left"] <= 3600, report)
        self.assertTrue(0 < report["seconds_to_save"] < 60, report)
        self.assertEqual([note for note in report["notes"] if "Slurm" in note], [])
        self.assertRegex(check(path, "--save-within", 180)[1], r"; Slurm ends this job in (60|59) min, and asks it to save 3 min before the end")
        self.assertIn("asked as soon as it has begun", check(path, "--save-within", 4000)[1])

        # A checkpoint of 0.4 GB on a disk that takes 8 MB in 3 s.
        (self.root / "wide.json").write_text(json.dumps(CONFIG | dict(vocab_size=1_000_000)))
        wide, _ = self.run_file("wide", source=f'architecture = "{self.root}/wide.json"')
        library = self.root / "slow.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-o", library, Path(__file__).parent.parent / "slurm/slow.c"], check=True)
        slow = dict(LD_PRELOAD=str(library), SLOW_WRITES="3000")
        code, said = check(wide, "--save-within", 60, seconds=90, **slow)
        self.assertEqual(code, 2, said)
        self.assertRegex(said, r"the time limit is shorter than a save: a checkpoint \(0\.[0-9] GB\) takes about [0-9]+ (s|min) at the 0\.00[0-9.]+ GB/s of all nodes, "
                               r"and Slurm ends this job in [0-9]+ s: give it more time")
        code, said = check(wide, "--save-within", 60, seconds=36000, **slow)
        self.assertEqual(code, 0, said)
        self.assertRegex(said, r"note: a checkpoint .*only 60 s before it ends the job.*--signal=B:USR2@\d+")
        self.assertIn("--wait x: a positive number of seconds", self.here(path, "--wait", "x")[1])

    def test_more_tasks_than_gpus(self):
        path, _ = self.run_file("run", MOE, global_batch=24)
        job = dict(SLURM_NTASKS="12", SLURM_NNODES="2", SLURM_GPUS_ON_NODE="4")
        code, said = self.here(path, "--files-only", "--set", "run.device=cuda", **job)
        self.assertEqual((code, said.count("upcycle: ")), (2, 1), said)
        self.assertIn("there are more tasks than GPUs: 12 tasks on 2 nodes of 4 GPUs each", said)
        for settings, changes in ((["run.device=cuda", "run.share_gpu=true"], {}), (["run.device=cpu"], {}), (["run.device=cuda"], {"SLURM_NTASKS": "8"})):
            self.assertEqual(self.here(path, "--files-only", "--set", *settings, **(job | changes)), (0, ""), settings)

    def test_a_part_of_a_job(self):
        """Inside of a Slurm job mpirun must start all of its tasks; single processes, other commands and the arms of a sweep need not."""
        path, run = self.run_file("run", MOE)
        job = ["-x", "SLURM_JOB_ID=17", "-x", "SLURM_NTASKS=4"]

        def by_mpirun(*arguments, ranks, expect):
            line = [*MPIRUN, *job, "-np", ranks, served(tiny_run.UPCYCLE), *arguments]
            result = subprocess.run([*map(str, line)], capture_output=True, text=True, cwd=self.root, timeout=120)
            self.assertEqual(result.returncode, expect, result.stdout + result.stderr)
            return result.stdout + result.stderr

        for command in ("train", "check"):
            for ranks in (1, 2):
                said = by_mpirun(command, path, ranks=ranks, expect=2)
                self.assertIn(f"upcycle: mpirun started {ranks} rank{'s' if ranks > 1 else ''}, but this Slurm job has 4 tasks (SLURM_NTASKS = 4): "
                              "start as many (mpirun -np 4)", said)
                self.assertEqual(said.count("upcycle: "), 1, said)
        self.assertFalse(run.exists())
        self.assertIn("ready", by_mpirun("check", path, ranks=4, expect=0))
        by_mpirun("convert", path, ranks=2, expect=0)
        by_mpirun("verify", checkpoint(run, 0), ranks=2, expect=0)
        code, said = self.here(path, SLURM_JOB_ID="17", SLURM_NTASKS="4")
        self.assertEqual(code, 0, said)

        base, _ = self.run_file("base", MOE, steps=1)
        sweep = self.root / "sweep.toml"
        sweep.write_text(f'[sweep]\nbase = "{base}"\ndirectory = "{self.root}/arms"\ncontrol = false\nranks = 2\n'
                         f'launcher = "{" ".join([*MPIRUN, "-x", "SLURM_JOB_ID=17"])}"\n[[arms]]\noptimizer.lr = 1e-4\n')
        result = subprocess.run([tiny_run.UPCYCLE, "sweep", sweep], capture_output=True, text=True, cwd=self.root, timeout=120,
                                env=os.environ | {"SLURM_NTASKS": "4"})
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)

    @unittest.skipUnless(HOSTS, "needs mount namespaces")
    def test_room_for_all_checkpoints_that_are_kept(self):
        path, run = self.run_file("run", MOE + "[checkpoint]\nevery = 2\nkeep = 2\n")
        sizes = json.loads(subprocess.run([tiny_run.UPCYCLE, "plan", path, "--json"], capture_output=True, text=True).stdout)["checkpoint_bytes"]
        full, first = sizes["full"], sizes["step_zero"]
        run.mkdir()
        for room, code, words in ((2 * full + first, 2, f"the rest of 3 checkpoints (checkpoint.keep and keep_every, and one being written) needs {3 * full / 1e9:.2f} GB but {run} has"),
                                  (4 * full, 0, "checkpoints: 3 at once at most")):
            command = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size="$1" tmpfs "$2"; shift 2; exec "$@"', "sh", room, run, tiny_run.UPCYCLE, "check", path]
            said = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=self.root)
            self.assertEqual(said.returncode, code, said)
            self.assertIn(words, said.stdout + said.stderr)


class Lock(Cluster):
    @unittest.skipUnless(HOSTS, "needs UTS namespaces")
    def test_a_living_job_of_another_host_is_named(self):
        path, run = self.run_file("run", MOE, steps=100000)
        os.environ["SLURM_JOB_ID"] = "4711"
        self.addCleanup(os.environ.pop, "SLURM_JOB_ID", None)
        job = self.background(on_host("n7", tiny_run.UPCYCLE, "train", path))
        self.until(lambda: len(steps_of(run)) > 3)
        os.environ["SLURM_JOB_ID"] = "4712"
        begin = time.monotonic()
        said = self.upcycle("train", path, expect=2)
        self.assertLess(time.monotonic() - begin, 15)
        self.assertRegex(said, r"another job runs in this directory: process \d+ on host n7 \(Slurm job 4711\), since .*, whose last heartbeat says: step -?\d+, [a-z ]+. It is alive")
        job.send_signal(signal.SIGUSR2)
        self.finish(job, 75)
        done = steps_of(run)[-1]["step"]
        self.upcycle("train", path, "--set", f"train.steps={done + 2}", "--accept-changes")   # given back: nobody waits


class Stragglers(Cluster):
    def test_a_rank_that_is_often_stopped_is_the_slowest(self):
        path, run = self.run_file("run", MOE + "[log]\nevery = 10\n", steps=1000000, global_batch=6)
        job = self.start("train", path, run=run, ranks=3, after=10)
        victim = self.ranks_of(job)[2]
        first = steps_of(run)[-1]["step"] + 15
        while steps_of(run)[-1]["step"] < first + 60:
            self.assertIsNone(job.poll())
            os.kill(victim, signal.SIGSTOP)
            time.sleep(0.1)
            os.kill(victim, signal.SIGCONT)
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR2)
        said = self.finish(job, 75)
        told = [line for line in steps_of(run) if "slowest_rank" in line]
        self.assertTrue(all(line["step"] % 10 == 0 for line in told), "once per log interval")
        slowest = [line["slowest_rank"] for line in told if line["step"] > first]
        self.assertGreaterEqual(len(slowest), 5)
        self.assertGreaterEqual(sum(one["rank"] == 2 and one["over_median"] > 1.5 for one in slowest), len(slowest) - 1, slowest)
        self.assertEqual({one["host"] for one in slowest}, {HOST})
        self.assertEqual([len(line["seconds_of_rank"]) for line in told], [3] * len(told))
        self.assertRegex(said, rf"step .*slowest rank 2 \({HOST}\) [0-9.]+x")


if __name__ == "__main__":
    tiny_run.UPCYCLE = os.path.abspath(sys.argv.pop(1))
    unittest.main()
