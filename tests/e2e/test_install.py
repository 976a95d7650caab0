#!/usr/bin/env python3
"""cmake --install: the program starts from its new place with no environment, the scripts with their Python, and nothing points into the
build tree. Usage: test_install.py CMAKE BUILD_DIR [unittest arguments]"""
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

CMAKE = BUILD = None


class Install(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        scratch = tempfile.TemporaryDirectory(prefix="install test ")
        cls.addClassCleanup(scratch.cleanup)
        cls.prefix = Path(scratch.name) / "upcycle"
        subprocess.run([CMAKE, "--install", BUILD, "--prefix", cls.prefix], check=True, stdout=subprocess.DEVNULL)

    def start(self, *command, cwd="/"):
        result = subprocess.run(command, env={"PATH": "/usr/bin:/bin"}, cwd=cwd, text=True, capture_output=True, timeout=100)
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)
        return result.stdout

    def test_program(self):
        self.assertIn("LibTorch", self.start(self.prefix / "bin/upcycle", "--version"))
        share = self.prefix / "share/upcycle"
        self.assertIn("4.89 B total", self.start(self.prefix / "bin/upcycle", "plan", "configs/qwen3-1.7b-4e.toml", cwd=share))
        for name in ("configs/models/qwen3-14b.json", "checkpoints-schema/manifest.schema.json", "slurm/train.sbatch"):
            self.assertTrue((share / name).is_file(), name)

    def test_program_does_not_need_the_build_tree(self):
        dynamic = self.start("objdump", "--private-headers", self.prefix / "bin/upcycle")
        paths = [line.split(None, 1)[1] for line in dynamic.splitlines() if line.split()[:1] in (["RUNPATH"], ["RPATH"])]
        self.assertTrue(any(path.endswith("/torch/lib") for path in ":".join(paths).split(":")), paths)
        self.assertNotIn(str(BUILD), dynamic)

    def test_tools(self):
        commands = sorted(path.name for path in (self.prefix / "bin").glob("upcycle-*"))
        self.assertIn("upcycle-plots", commands)
        self.assertIn("upcycle-slurm-lab", commands)
        for command in commands:   # with their modules and their Python's packages
            self.assertIn("usage:", self.start(self.prefix / "bin" / command, "--help").lower(), command)
        for path in (self.prefix / "libexec/upcycle").glob("*"):
            self.assertTrue(os.access(path, os.X_OK), path)


if __name__ == "__main__":
    CMAKE, BUILD = sys.argv.pop(1), Path(sys.argv.pop(1)).resolve()
    unittest.main()
