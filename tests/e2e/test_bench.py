#!/usr/bin/env python3
"""tools/bench: both sides of a comparison do the same work, what it reports is what it measured, and a measurement that is none is refused.
Usage: test_bench.py UPCYCLE SOURCE_DIR [unittest arguments]"""
import json
import statistics
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

UPCYCLE = SOURCE = None
sys.dont_write_bytecode = True


class Bench(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.root = Path(scratch.name)

    def bench(self, *arguments, expect=0):
        result = subprocess.run([sys.executable, SOURCE / "tools/bench", *map(str, arguments)], capture_output=True, text=True, timeout=280)
        self.assertEqual(result.returncode, expect, result.stdout + result.stderr)
        return result.stdout + result.stderr

    def test_training(self):
        out = self.root / "out.json"
        said = self.bench("cpu", "--only", "training", "--size", "tiny", "--precision", "fp32", "--steps", 2, "--repeats", 1, "--threads", 2,
                          "--upcycle", UPCYCLE, "--scratch", self.root, "--json", out)
        self.assertEqual(sorted(self.root.iterdir()), [out], "scratch files are left")
        rows = json.loads(out.read_text())["training"]
        self.assertEqual([row["model"] for row in rows], ["dense", "moe"])
        for row in rows:
            self.assertEqual(set(row["losses"]), {"transformers", "ours, 1 rank", "ours, 2 ranks"})
            for losses in row["losses"].values():   # every step, as AdamW and clipping are the same, too
                self.assertEqual(len(losses), 4)
                for mine, theirs in zip(losses, row["losses"]["transformers"]):
                    self.assertAlmostEqual(mine, theirs, delta=1e-4 * theirs)
            rates = row["tokens_per_second"]
            for side, rate in rates.items():
                self.assertAlmostEqual(rate, row["tokens_per_step"] / statistics.median(row["run_medians_seconds"][side]))
            best = max(rate for side, rate in rates.items() if side != "transformers")
            self.assertRegex(said, rf'\n{row["model"]} .* {rates["transformers"]:.0f} .* {best:.0f} .* {best / rates["transformers"]:.2f} ')

    def test_other_work_is_refused(self):
        """A program that trains on other tokens stands for one that does other work."""
        program = self.root / "upcycle"
        program.write_text(f'#!/bin/sh\n[ "$1" = train ] && sed -i "s/^train = .*/train = \\"mock\\"/" "$2"\nexec "{UPCYCLE}" "$@"\n')
        program.chmod(0o755)
        said = self.bench("cpu", "--only", "training", "--size", "tiny", "--precision", "fp32", "--steps", 1, "--repeats", 1, "--threads", 1,
                          "--upcycle", program, expect=1)
        self.assertIn("they do not do the same work", said)

    def test_memory(self):
        sys.path.insert(0, str(SOURCE / "tools"))
        from benchmarks import common
        allocate = "import sys, time; x = bytearray(200_000_000); time.sleep(0.3); sys.stdout.write('done')"
        done = common.run(["bash", "-c", f'"{sys.executable}" -c "{allocate}" & "{sys.executable}" -c "{allocate}"; wait'], common.environment(1),
                          watch="python")
        self.assertEqual(done.output, "donedone")
        self.assertGreater(done.anonymous_bytes, 400_000_000)
        self.assertLess(done.anonymous_bytes, 460_000_000)
        with self.assertRaisesRegex(common.Failed, "ended with code 3"):
            common.run(["bash", "-c", "exit 3"], common.environment(1))

    def test_usage(self):
        self.assertIn("cpu ", self.bench("--help"))
        self.assertIn("--json", self.bench("cpu", "--help"))
        self.assertIn("no part gpus", self.bench("gpus", expect=2))
        self.assertIn("which part?", self.bench(expect=2))
        self.assertIn("--repeats must be 1 or more", self.bench("cpu", "--repeats", 0, expect=2))
        self.assertIn("no program /nowhere", self.bench("cpu", "--upcycle", "/nowhere", expect=1))

    def test_help_of_every_tool(self):
        for tool in ("setup", "test", "quickstart", "bundle", "bench"):
            for directory, program in ((SOURCE / "tools", f"./{tool}"), ("/", SOURCE / "tools" / tool)):
                result = subprocess.run([program, "--help"], cwd=directory, capture_output=True, text=True, timeout=60)
                self.assertEqual((result.returncode, result.stderr), (0, ""), tool)
                self.assertIn(f"tools/{tool}", result.stdout.splitlines()[0])
            if tool != "test":   # whose further words are CTest's
                result = subprocess.run([SOURCE / "tools" / tool, "--nonsense"], capture_output=True, text=True, timeout=60)
                self.assertEqual((result.returncode, result.stdout), (2, ""), tool)
                self.assertIn(f"tools/{tool}", result.stderr)


if __name__ == "__main__":
    UPCYCLE, SOURCE = Path(sys.argv.pop(1)).resolve(), Path(sys.argv.pop(1)).resolve()
    unittest.main()
