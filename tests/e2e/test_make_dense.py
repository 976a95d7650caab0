#!/usr/bin/env python3
"""tools/make-dense: the shapes and files of the originals, transformers loads them, the same bytes for the same seed."""
import json
import os
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import tool_module

tool = tool_module.load("make-dense")
TOOL = tool_module.TOOLS / "make-dense"


def run(*arguments):
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True, timeout=200)


class Originals(unittest.TestCase):
    """What the model cards say; nothing is written."""

    def test_parameters_and_files(self):
        for size, parameters, files, tensors in (
            ("0.6b", 596_049_920, 1, 310), ("1.7b", 1_720_574_976, 1, 310), ("4b", 4_022_468_096, 3, 398),
            ("8b", 8_190_735_360, 5, 399), ("14b", 14_768_307_200, 8, 443), ("32b", 32_762_123_264, 17, 707),
        ):
            spread = tool.spread(tool.read_config(size, None, "bfloat16"), 2)
            self.assertEqual(len(spread), files, size)
            self.assertEqual(sum(total for _, _, total in spread), 2 * parameters, size)
            self.assertEqual(sum(len(entries) for _, entries, _ in spread), tensors, size)

    def test_files_of_8b(self):
        spread = tool.spread(tool.read_config("Qwen3-8B", None, "bfloat16"), 2)
        self.assertEqual([name for name, _, _ in spread], [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)])
        for (_, _, total), card in zip(spread, (4.0, 3.99, 3.96, 3.19, 1.24)):
            self.assertAlmostEqual(total / 1e9, card, delta=0.0051)


class Small(unittest.TestCase):
    """Two layers of 0.6B: real widths and vocabulary."""

    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory(prefix="upcycle-dense-")
        cls.folder = Path(cls.temporary.name) / "dense"
        cls.first = run("0.6b", cls.folder, "--layers", 2)
        assert cls.first.returncode == 0, cls.first.stderr

    @classmethod
    def tearDownClass(cls):
        cls.temporary.cleanup()

    def load(self, folder):
        import torch
        from transformers import AutoModelForCausalLM
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            self.assertFalse(info[kind], kind)
        return torch, model

    def test_transformers_loads_it_and_runs_it(self):
        torch, model = self.load(self.folder)
        self.assertEqual(model.dtype, torch.bfloat16)
        self.assertEqual((model.config.num_hidden_layers, model.config.vocab_size), (2, 151936))
        self.assertEqual(sum(parameter.numel() for parameter in model.parameters()), 187_045_376)
        self.assertIn("187045376 parameters, 0.37 GB in 1 file", self.first.stdout)
        with torch.no_grad():
            logits = model(torch.arange(8)[None]).logits
        self.assertTrue(logits.isfinite().all())
        self.assertGreater(logits.std(), 0.01)
        for name, parameter in model.named_parameters():
            norm = parameter.dim() == 1
            values = parameter.detach().float()
            self.assertAlmostEqual(values.mean().item(), float(norm), delta=0.01 if norm else 1e-4, msg=name)
            self.assertAlmostEqual(values.std().item(), 0.02, delta=0.006 if norm else 1e-4, msg=name)
        q, k = (model.model.layers[i].self_attn.q_proj.weight for i in (0, 1))
        self.assertLess(torch.corrcoef(torch.stack([q.flatten(), k.flatten()]).float())[0, 1].abs(), 0.01)

    def test_several_files_give_the_same_tensors(self):
        """As a large model is written, with files of 350 MB at most."""
        from safetensors import safe_open
        config = tool.read_config("0.6b", 2, "bfloat16")
        with tempfile.TemporaryDirectory(prefix="upcycle-dense-") as name:
            folder = Path(name)
            tool.write_model(folder, config, "bfloat16", 0, 350_000_000)
            self.assertEqual(sorted(path.name for path in folder.iterdir()),
                             ["config.json", "generation_config.json", "model-00001-of-00002.safetensors",
                              "model-00002-of-00002.safetensors", "model.safetensors.index.json"])
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            self.assertEqual(index["metadata"]["total_size"], 2 * 187_045_376)
            _, model = self.load(folder)
            state = model.state_dict()
            with safe_open(self.folder / "model.safetensors", "pt") as file:
                self.assertEqual(set(index["weight_map"]), set(file.keys()))
                for name in file.keys():
                    self.assertTrue(file.get_tensor(name).equal(state[name]), name)

    def test_seed_and_dtype_decide_the_bytes(self):
        from safetensors.numpy import load_file
        config = tool.read_config("0.6b", 1, "float32")
        config["vocab_size"] = 5000  # for this comparison alone; chunks made beside one another are compared above
        with tempfile.TemporaryDirectory(prefix="upcycle-dense-") as name:
            written = []
            for i, (dtype, seed) in enumerate((("float32", 7), ("float32", 7), ("float32", 8))):
                folder = Path(name) / str(i)
                folder.mkdir()
                tool.write_model(folder, config, dtype, seed)
                written.append(folder / "model.safetensors")
            self.assertEqual(written[0].read_bytes(), written[1].read_bytes())
            one, other = load_file(written[0]), load_file(written[2])
            self.assertEqual(str(one["model.norm.weight"].dtype), "float32")
            for tensor in one:
                self.assertFalse((one[tensor] == other[tensor]).all(), tensor)


class Refusals(unittest.TestCase):
    def test_each_says_what_to_do_and_leaves_nothing(self):
        with tempfile.TemporaryDirectory(prefix="upcycle-dense-") as name:
            free = os.statvfs(name).f_bavail * os.statvfs(name).f_frsize / 1e9
            cases = [(("1.6b", "new"), "did you mean 1.7b?"), (("Qwen3-15B", "new"), "did you mean 14b?"),
                     (("huge", "new"), "Known are 0.6b, 1.7b, 4b, 8b, 14b, 32b"), (("4b", "new", "--layers", "37"), "Qwen3-4b has 36"),
                     (("4b", "new", "--layers", "0"), "1 to that many"), (("0.6b", "."), "not an empty directory")]
            if free < 131:
                cases.append((("32b", "new", "--dtype", "float32"), "131.05 GB are needed"))
            (Path(name) / "mine").write_text("mine")
            for (size, folder, *options), message in cases:
                result = run(size, Path(name) / folder, *options)
                self.assertEqual(result.returncode, 2, result)
                self.assertIn(message, result.stderr)
                self.assertNotIn("Traceback", result.stderr)
                self.assertEqual(os.listdir(name), ["mine"])

    def test_one_that_was_killed_is_named(self):
        with tempfile.TemporaryDirectory(prefix="upcycle-dense-") as name:
            (Path(name) / "new.partial").mkdir()
            result = run("0.6b", Path(name) / "new", "--layers", 1)
            self.assertEqual(result.returncode, 2, result)
            self.assertIn("new.partial exists", result.stderr)


if __name__ == "__main__":
    unittest.main()
