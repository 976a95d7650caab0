#!/usr/bin/env python3
"""tools/bundle: what it packs starts on a machine of another kind: little environment, torch in a venv, in conda or behind a .pth,
MPI from a module, paths with spaces, links; and says in one message what such a machine lacks.
Usage: test_bundle.py UPCYCLE SOURCE_DIR [unittest arguments]"""
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import tiny_run

UPCYCLE = SOURCE = None
TORCH = VERSION = None   # those that the executable was linked with
BARE = {"PATH": "/usr/local/bin:/usr/bin:/bin"}


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def edit(path, old, new):
    text = path.read_text()
    assert old in text, (path, old)
    path.write_text(text.replace(old, new))


class Bundle(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        global TORCH, VERSION
        TORCH = Path(re.search(r"libtorch_cpu.so => (.*)/lib/libtorch_cpu.so ", subprocess.check_output(["ldd", UPCYCLE], text=True))[1])
        VERSION = re.search(r"^__version__ = '(.*)'", (TORCH / "version.py").read_text(), re.M)[1]
        scratch = tempfile.TemporaryDirectory(prefix="bundle test ")
        cls.addClassCleanup(scratch.cleanup)
        cls.root = Path(scratch.name)
        cls.here = cls.root / "packed here" / "bundle"
        second = shutil.copy2(UPCYCLE, cls.root / "gpu_something")
        cls.said = subprocess.run([SOURCE / "tools/bundle", cls.here, UPCYCLE, "--with", second], check=True, text=True,
                                  stdout=subprocess.PIPE).stdout
        # The same bundle on a machine where torch is not where it was at packing.
        cls.there = cls.root / "elsewhere" / "bundle"
        shutil.copytree(cls.here, cls.there)
        edit(cls.there / "upcycle", f"torch_when_packed='{TORCH}'", "torch_when_packed='/nowhere/torch'")
        # And one that shows the environment its program would get.
        cls.probe = cls.root / "probe" / "bundle"
        cls.probe.mkdir(parents=True)
        shutil.copy2(cls.there / "upcycle", cls.probe)
        script(cls.probe / "bin/upcycle", "env")

    def setUp(self):
        scratch = tempfile.TemporaryDirectory(prefix="bundle case ")
        self.addCleanup(scratch.cleanup)
        self.scratch = Path(scratch.name)

    def start(self, program, *arguments, expect=0, env=BARE, cwd="/"):
        result = subprocess.run([program, *arguments], env=env, cwd=cwd, text=True, capture_output=True, timeout=100)
        self.assertEqual(result.returncode, expect, result.stdout + result.stderr)
        return result.stdout if expect == 0 else result.stderr

    def environment(self, env):
        lines = self.start(self.probe / "upcycle", env=BARE | env).splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def refused(self, program, *words, env=BARE):
        said = self.start(program, "--version", expect=2, env=env)
        for word in words:
            self.assertIn(word, said)
        self.assertEqual(said.count("upcycle: "), 1, said)
        return said

    def installation(self, name, version=None):
        """A Python installation with torch: this one's, or one that says it is `version`."""
        packages = self.scratch / name / "lib/python3.11/site-packages"
        packages.mkdir(parents=True)
        if version:
            (packages / "torch/lib").mkdir(parents=True)
            (packages / "torch/version.py").write_text(f"__version__ = '{version}'\n")
            (packages / "torch/lib/libtorch_cpu.so").touch()
        else:
            (packages / "torch").symlink_to(TORCH)
        script(self.scratch / name / "bin/python3", f"touch '{self.scratch}/a Python was started'; exit 1")
        return self.scratch / name

    def test_what_is_packed(self):
        for name in ("upcycle", "bin/upcycle", "gpu_something", "bin/gpu_something", "tools/plots", "tools/bench", "tools/peers/peer.py", "configs/models/qwen3-14b.json",
                     "slurm/train.sbatch"):
            self.assertTrue((self.here / name).exists(), name)
        self.assertEqual((self.here / "libexec/upcycle/tokens").exists(), (SOURCE / "tools/tokens").exists())
        libraries = {path.name.split(".so")[0] for path in (self.here / "lib").iterdir()}
        self.assertTrue({"libxxhash", "libspdlog"} <= libraries, libraries)
        self.assertFalse({"libmpi", "libtorch_cpu", "libc", "libstdc++", "libcudart"} & libraries, libraries)
        self.assertIn(VERSION, self.said)
        self.assertEqual(sorted(path.name for path in self.here.parent.iterdir()), ["bundle"])   # nothing beside it
        self.assertFalse((self.here / "upcycle").stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH))
        if shutil.which("dpkg-query"):
            self.assertGreater(len(list((self.here / "licenses").iterdir())), 5)

    def test_libraries_come_from_the_bundle(self):
        libraries = self.start("/usr/bin/env", f"LD_LIBRARY_PATH={TORCH}/lib", "ldd", self.there / "bin/upcycle")
        for packed in (self.there / "lib").iterdir():
            self.assertIn(f"{packed.name} => {self.there}/bin/../lib/{packed.name} ", libraries)

    def test_starts_with_nothing_and_from_anywhere(self):
        before = [(path, path.stat().st_mtime_ns) for path in sorted(self.here.rglob("*"))]
        self.assertIn("LibTorch", self.start(self.here / "upcycle", "--version", env={}))
        link = self.scratch / "a link"
        link.symlink_to(self.here / "upcycle")
        (self.scratch / "another").symlink_to("a link")
        self.assertIn("LibTorch", self.start("./another", "--version", cwd=self.scratch))
        self.assertIn("LibTorch", self.start("bundle/gpu_something", "--version", cwd=self.here.parent))
        self.assertIn("596.05 M total", self.start("./upcycle", "plan", "configs/qwen3-0.6b-8e.toml", "--set", "moe.experts=0", cwd=self.here))
        self.assertEqual([(path, path.stat().st_mtime_ns) for path in sorted(self.here.rglob("*"))], before)

    def test_arguments_and_code_are_the_programs(self):
        script(self.probe / "bin/upcycle", 'printf "<%s>" "$@"; exit 75')
        self.addCleanup(script, self.probe / "bin/upcycle", "env")
        result = subprocess.run([self.probe / "upcycle", "a b", "*", ""], env=BARE | {"VIRTUAL_ENV": str(self.installation("venv"))},
                                capture_output=True, text=True)
        self.assertEqual((result.returncode, result.stdout), (75, "<a b><*><>"), result.stderr)

    def test_two_ranks_train(self):
        source = tiny_run.make_dense(self.scratch / "source")
        run = self.scratch / "run.toml"
        run.write_text(f'[run]\ndirectory = "{self.scratch}/run"\ndevice = "cpu"\n[source]\nmodel = "{source}"\n{tiny_run.MOE}[data]\ntrain = "mock"\n'
                       f'[train]\nsteps = 2\nsequence = {tiny_run.SEQUENCE}\nglobal_batch = 4\nprecision = "fp32"\n[parallel]\nexpert = 2\n')
        env = os.environ | {"UPCYCLE_PYTHON": str(self.installation("venv") / "bin/python3")}
        self.start(*tiny_run.MPIRUN, "-np", "2", self.there / "upcycle", "train", run, env=env, cwd=self.scratch)
        self.assertEqual([line["step"] for line in tiny_run.steps_of(self.scratch / "run")], [1, 2])

    def test_where_torch_is_found(self):
        venv, conda, other = (self.installation(name) for name in ("a venv", "conda", "other"))
        old = self.installation("old", "2.1.0+cu118")

        def found(env):
            said = self.environment(env)
            return Path(said["LD_LIBRARY_PATH"].split(":")[0]).parents[4], said.get("UPCYCLE_PYTHON")

        self.assertEqual(found({"UPCYCLE_PYTHON": f"{venv}/bin/python3", "VIRTUAL_ENV": str(conda)}), (venv, f"{venv}/bin/python3"))
        self.assertEqual(found({"VIRTUAL_ENV": str(venv)}), (venv, f"{venv}/bin/python3"))
        self.assertEqual(found({"CONDA_PREFIX": str(conda), "PATH": f"{old}/bin:/usr/bin:/bin"}), (conda, f"{conda}/bin/python3"))
        self.assertEqual(found({"PYTHONPATH": f"/nowhere:{other}/lib/python3.11/site-packages"}), (other, f"{other}/bin/python3"))
        self.assertEqual(found({"PATH": f"{venv}/bin:/usr/bin:/bin"})[0].resolve(), venv.resolve())
        self.assertFalse((self.scratch / "a Python was started").exists())
        before = self.environment({"VIRTUAL_ENV": str(venv), "LD_LIBRARY_PATH": "/some/where:/and more"})["LD_LIBRARY_PATH"]
        self.assertTrue(before.endswith(":/some/where:/and more"), before)

    def test_torch_that_only_python_knows(self):
        venv = self.scratch / "venv"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
        next(venv.glob("lib/python3*/site-packages")).joinpath("more.pth").write_text(f"{TORCH.parent}\n")
        said = self.environment({"UPCYCLE_PYTHON": f"{venv}/bin/python"})
        self.assertEqual(said["LD_LIBRARY_PATH"].split(":")[0], f"{TORCH}/lib")

    def test_torch_missing_or_another(self):
        old = self.installation("old", "2.1.0+cu118")
        said = self.refused(self.there / "upcycle", VERSION, "2.1.0+cu118", f"{old}/lib", env=BARE | {"VIRTUAL_ENV": str(old)})
        self.assertIn("UPCYCLE_PYTHON", said)
        empty = self.scratch / "empty"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", empty], check=True)
        self.refused(self.there / "upcycle", VERSION, f"{empty}/bin/python has no such torch", env=BARE | {"UPCYCLE_PYTHON": f"{empty}/bin/python"})
        self.refused(self.there / "upcycle", "/nowhere/python, which is not there", env=BARE | {"UPCYCLE_PYTHON": "/nowhere/python"})

    def test_mpi_of_a_module_that_sets_only_path(self):
        venv, module = self.installation("venv"), self.scratch / "open mpi"
        script(module / "bin/mpirun", "exit 1")
        (module / "lib").mkdir()
        (module / "lib/libmpi.so.40").touch()
        libraries = self.environment({"VIRTUAL_ENV": str(venv), "PATH": f"{module}/bin:/usr/bin:/bin"})["LD_LIBRARY_PATH"]
        self.assertTrue(libraries.endswith(f":{module}/lib"), libraries)

    def test_mpi_missing_or_another(self):
        # A bundle that was made with another MPI stands for a machine that has another MPI.
        other = self.scratch / "other"
        shutil.copytree(self.here, other)
        edit(other / "upcycle", "mpi='libmpi.so.40'", "mpi='libmpi.so.41'")
        subprocess.run(["patchelf", "--replace-needed", "libmpi.so.40", "libmpi.so.41", *other.glob("bin/*"), *other.glob("lib/libhdf5*")], check=True)
        said = self.refused(other / "upcycle", "no Open MPI 4.1 on ", "libmpi.so.41 is neither")
        if Path("/usr/lib/x86_64-linux-gnu/libmpi.so.40").exists():
            self.assertIn("/usr/lib/x86_64-linux-gnu/libmpi.so.40 is of another MPI", said)
        # Open MPI 3 has the same name, but not all that 4.1 has.
        (self.scratch / "openmpi3").mkdir()
        (self.scratch / "openmpi3/libmpi.so.40.10.4").touch()
        (self.scratch / "openmpi3/libmpi.so.40").symlink_to("libmpi.so.40.10.4")
        self.refused(self.here / "upcycle", f"{self.scratch}/openmpi3 has Open MPI 3", env=BARE | {"LD_LIBRARY_PATH": f"{self.scratch}/openmpi3"})

    def test_packing_again_and_refusals(self):
        mine = self.scratch / "mine"
        mine.mkdir()
        (mine / "precious").touch()
        for arguments, word in (((mine, UPCYCLE), "holds something else"), ((self.scratch / "new", "/nowhere"), "no executable /nowhere"),
                                ((self.scratch / "new", UPCYCLE, "--with", "/nowhere"), "no file /nowhere")):
            self.assertIn(word, self.start(SOURCE / "tools/bundle", *arguments, expect=2, env=os.environ))
        self.assertEqual(sorted(path.name for path in self.scratch.rglob("*")), ["mine", "precious"])
        again = self.scratch / "bundle"
        (again / "bin").mkdir(parents=True)
        (again / "bin/upcycle").touch()
        (again / "lib").mkdir()
        (again / "lib/of an older bundle").touch()
        self.start(SOURCE / "tools/bundle", again, UPCYCLE, env=os.environ)
        self.assertFalse((again / "lib/of an older bundle").exists())
        self.assertIn("LibTorch", self.start(again / "upcycle", "--version"))
        self.assertEqual(sorted(path.name for path in self.scratch.iterdir()), ["bundle", "mine"])


if __name__ == "__main__":
    UPCYCLE, SOURCE = Path(sys.argv.pop(1)).resolve(), Path(sys.argv.pop(1)).resolve()
    unittest.main()
