"""A mixture grown into a larger one, and a mixture out of several dense models: certified, the same on any layout, exported, refused by name.
Usage: grow_more.py UPCYCLE [unittest arguments]"""
import json
import os
import shutil
import sys
import unittest

import numpy as np
import tiny_run
from safetensors.numpy import load_file
from tiny_run import FFN, LAYERS, SEQUENCE, VOCAB, TrainCase, checkpoint, dense_tensors, make_dense, steps_of

CONSTANT = '[optimizer]\nschedule = "constant"\nlr = 3e-3\nclip = 0.0\nrouter_lr_scale = 1.0\n'
SMALL = "[moe]\nexperts = 4\ntop_k = 2\n"
LARGE = "[moe]\nexperts = 12\ntop_k = 6\n"


def losses(run):
    return np.array([line["loss"] for line in steps_of(run)])


def certificate(run):
    return json.loads((checkpoint(run, 0) / "certificate.json").read_text())


def logits(directory, tokens):
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging
    logging.disable_progress_bar()
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)(torch.tensor(tokens)).logits.numpy()


TOKENS = np.arange(2 * SEQUENCE).reshape(2, SEQUENCE) * 7 % VOCAB


class LargerMixture(TrainCase):
    def setUp(self):
        super().setUp()
        path, self.small = self.run_file("small", CONSTANT + SMALL + "[balance]\nbias_rate = 0.0\n", steps=6)
        self.upcycle("train", path)
        self.exported = self.root / "small-exported"
        self.upcycle("export", self.small, self.exported)

    def grow(self, name, extra=LARGE, steps=0, ranks=1, source=None, expect=0, **settings):
        path, run = self.run_file(name, CONSTANT + extra, steps=steps, source=f'model = "{source or self.small}"', **settings)
        said = self.upcycle("train", path, ranks=ranks, expect=expect)
        return run, said

    def test_it_is_the_source(self):
        """From a checkpoint and from a directory, on any layout the same bytes; certified exact; the same logits in transformers."""
        run, said = self.grow("one")
        self.assertIn("12 experts = 3 copies x 4 experts", said)
        self.assertIn("stay equal", said)
        self.assertEqual((certificate(run)["verdict"], certificate(run)["expected"]), ("passed", "exact"))
        self.assertLess(certificate(run)["functions"][0]["logits"]["relative_l2"], 1e-5)
        self.assertEqual(certificate(run)["functions"][0]["routing"]["complete_copies"], 1)
        for name, ranks, layout, source in (("expert", 2, "expert = 2\n", None), ("tensor", 2, "tensor = 2\nexpert_tensor = 2\n", None),
                                            ("pipeline", 2, "pipeline = 2\n", self.exported)):
            other, _ = self.grow(name, LARGE + "[parallel]\n" + layout, ranks=ranks, source=source)
            self.assert_same_files(checkpoint(run, 0), checkpoint(other, 0))
            self.assertEqual(certificate(other)["verdict"], "passed")
        self.upcycle("export", run, self.root / "large")
        self.assertEqual(json.loads((self.root / "large/config.json").read_text())["num_experts"], 12)
        np.testing.assert_allclose(logits(self.root / "large", TOKENS), logits(self.exported, TOKENS), rtol=0, atol=2e-5)
        path, _ = self.run_file("plan", CONSTANT + LARGE, source=f'model = "{self.small}"')
        self.assertIn("exact, lossless: 3 copies x 4 experts", self.upcycle("plan", path))
        self.refused("export", run, self.root / "x", "--dense", words=["--dense", "mixture of 4 experts"])

    def test_it_learns_as_the_source_would(self):
        """Copies share the source's moments and gradients, scaled: step for step the same losses."""
        carry = '[upcycle]\noptimizer = "scaled"\n'
        small, _ = self.grow("small-on", carry, steps=5)
        large, _ = self.grow("large-on", LARGE + carry, steps=5)
        np.testing.assert_allclose(losses(large), losses(small), rtol=2e-5)
        fresh, _ = self.grow("fresh", LARGE, steps=5)
        self.assertGreater(np.abs(losses(fresh) - losses(small))[1:].max(), 1e-3)

    def test_biases_travel(self):
        path, biased = self.run_file("biased", CONSTANT + SMALL + "[balance]\nbias_rate = 0.02\nscope = \"global\"\n", steps=4)
        self.upcycle("train", path)
        run, _ = self.grow("grown", source=biased)
        before, after = (json.loads((checkpoint(r, s) / "manifest.json").read_text())["training"]["routers"] for r, s in ((biased, 4), (run, 0)))
        for layer, router in before.items():
            self.assertTrue(any(router["bias"]))
            for what, values in router.items():
                self.assertEqual(after[layer][what], [value for value in values for _ in range(3)])
        on, _ = self.grow("as-it-is", "", steps=1, source=biased)
        large, _ = self.grow("larger", LARGE, steps=1, source=biased)
        np.testing.assert_allclose(losses(large), losses(on), rtol=1e-5)

    def test_what_is_not_exact_says_so(self):
        run, said = self.grow("same-k", LARGE.replace("top_k = 6", "top_k = 2") + '[upcycle]\nscaling = "none"\n')
        self.assertEqual((certificate(run)["verdict"], certificate(run)["expected"]), ("passed", "approximate"))
        self.assertGreater(certificate(run)["functions"][0]["logits"]["relative_l2"], 1e-3)
        run, said = self.grow("noise", LARGE + "[upcycle]\nnoise = 0.05\n")
        self.assertEqual((certificate(run)["verdict"], certificate(run)["expected"]), ("passed", "approximate"))
        self.assertNotIn("stay equal", said)

    def test_refusals(self):
        for extra, words in ((LARGE.replace("top_k = 6", "top_k = 2"), ["needs moe.top_k = 6", "2 of its 4", "3 times"]),
                             (LARGE.replace("12", "10"), ["moe.experts = 10", "8 or 12"]),
                             (LARGE.replace("top_k = 6", "top_k = 6\ngranularity = 2"), ["copied whole", "moe.granularity = 2"]),
                             (LARGE + '[upcycle]\npermutation = "clusters"\n', ["upcycle.permutation", "copied whole"])):
            for source in (self.small, self.exported):
                path, _ = self.run_file("refused", extra, source=f'model = "{source}"')
                self.refused("train", path, words=words)
                self.refused("plan", path, words=words)
        # A run that has a checkpoint does not grow behind its back.
        path, _ = self.run_file("small", CONSTANT + LARGE + "[balance]\nbias_rate = 0.0\n", steps=6)
        (self.small / "run.toml").write_text((self.small / "run.toml").read_text().replace("experts = 4 ", "experts = 12").replace("top_k = 2 ", "top_k = 6 "))
        self.refused("train", path, words=["holds another model than the run file asks for", "moe.experts: 4 there, 12 here"])


class SeveralSources(TrainCase):
    MOE = "[moe]\nexperts = 16\ntop_k = 4\ngranularity = 4\n"

    def setUp(self):
        super().setUp()
        random = np.random.default_rng(8)
        self.first = dense_tensors()
        self.second = {name: (value + 0.02 * random.standard_normal(value.shape)).astype(np.float32) for name, value in self.first.items()}
        self.other = make_dense(self.root / "other", self.second)

    def models(self, *directories, quotas=None):
        return f"models = {json.dumps([str(d) for d in directories])}\n" + (f"quotas = {quotas}" if quotas else "")

    def test_two_models(self):
        runs = []
        for order in ("identity", "clusters"):
            for ranks, layout in ((1, ""), (2, "expert = 2\ntensor = 2\n")):
                extra = self.MOE + f'[upcycle]\npermutation = "{order}"\n[parallel]\n' + layout
                path, run = self.run_file(f"{order}-{ranks}", extra, steps=1, source=self.models(self.source, self.other, quotas=[3, 1]))
                said = self.upcycle("train", path, ranks=ranks)
                self.assertIn("of 2 sources", said)
                told = certificate(run)
                self.assertEqual((told["verdict"], told["expected"], told["recipe"]["quotas"]), ("passed", "approximate", [3, 1]))
                self.assertGreater(told["functions"][0]["logits"]["relative_l2"], 1e-4)
                self.assertLess(told["functions"][0]["logits"]["relative_l2"], 1)
                runs.append(run)
            self.assert_same_files(checkpoint(runs[-2], 0), checkpoint(runs[-1], 0))
        out = self.root / "out"
        self.upcycle("export", checkpoint(runs[0], 0), out)
        stored = load_file(out / "model.safetensors")
        for name, value in self.first.items():
            mean = ((value.astype(np.float64) + self.second[name]) / 2).astype(np.float32)
            if ".mlp." not in name:
                np.testing.assert_array_equal(stored[name], mean)
                continue
            prefix, matrix = name.split(".mlp.")
            axis, factor = (1, 2) if "down" in matrix else (0, 2 if "up" in matrix else 1)
            for e in range(16):
                dense = value if e < 12 else self.second[name]
                np.testing.assert_array_equal(stored[f"{prefix}.mlp.experts.{e}.{matrix}"], np.split(dense, 4, axis=axis)[e % 4] * np.float32(factor))
        self.assertEqual(logits(out, TOKENS).shape, (2, SEQUENCE, VOCAB))
        # Merged, the feed-forwards are the mean by quotas.
        self.upcycle("export", checkpoint(runs[0], 0), self.root / "merged", "--dense")
        name = "model.layers.1.mlp.up_proj.weight"
        expected = (3 * self.first[name].astype(np.float64) + self.second[name]) / 4
        np.testing.assert_allclose(load_file(self.root / "merged/model.safetensors")[name], expected, rtol=1e-6, atol=1e-9)
        origin = json.loads((checkpoint(runs[0], 0) / "manifest.json").read_text())["provenance"]["source"]
        self.assertEqual([model["path"] for model in origin["models"]], [str(self.source), str(self.other)])

    def test_the_same_model_twice_is_exact(self):
        copy = self.root / "copy"
        shutil.copytree(self.source, copy)
        path, alone = self.run_file("alone", self.MOE, steps=0)
        self.upcycle("train", path)
        for name, directories in (("twice", (self.source, self.source)), ("copied", (self.source, copy))):
            path, run = self.run_file(name, self.MOE, steps=0, source=self.models(*directories))
            self.upcycle("train", path, ranks=2)
            self.assertEqual((certificate(run)["verdict"], certificate(run)["expected"]), ("passed", "exact"))
            self.assert_same_files(checkpoint(alone, 0), checkpoint(run, 0))

    def test_plan(self):
        path, _ = self.run_file("run", self.MOE, source=self.models(self.source, self.other))
        self.assertIn("approximate, lossless: 4 copies x 4 shards of 2 sources (exact if they are the same bytes)", self.upcycle("plan", path))

    def test_refusals(self):
        def refuse(words, directories, extra=self.MOE, quotas=None, command="train", ranks=1):
            path, _ = self.run_file("run", extra, source=self.models(*directories, quotas=quotas))
            self.refused(command, path, words=words, ranks=ranks)

        narrow = make_dense(self.root / "narrow", rope_theta=1e4, num_key_value_heads=1)
        for command in ("train", "plan"):
            refuse(["source.models", "no models of one shape", "rope_theta", "num_key_value_heads"], (self.source, narrow), command=command)
        words = make_dense(self.root / "words", self.second)
        (words / "tokenizer.json").write_text('{"version": "2.0"}')
        refuse(["tokenizer.json", "another content"], (self.source, words), ranks=2)
        (words / "tokenizer.json").unlink()
        refuse(["tokenizer.json: here, not there"], (self.source, words))
        (words / "tokenizer.json").write_text('{ "version":   "1.0" }')
        pair = (self.source, self.other)
        refuse(["source.quotas add up to 5", "4 copies"], pair, quotas=[4, 1])
        refuse(["3 quotas for 2 source.models"], pair, quotas=[2, 1, 1])
        refuse(["source.quotas", "entry 2"], pair, quotas=[4, 0])
        refuse(["moe.experts"], pair, extra="")
        refuse(["moe.experts"], pair, extra="", command="plan")
        refuse(["upcycle.optimizer", "several source.models"], pair, extra=self.MOE + '[upcycle]\noptimizer = "copy"\n')
        refuse(["nowhere", "not a directory"], (self.source, self.root / "nowhere"))
        refuse(["moe.experts"], pair, extra="", command="convert")
        path, _ = self.run_file("both", self.MOE, source=f'model = "{self.source}"\n' + self.models(*pair))
        self.refused("train", path, words=["source.models", "not both"])
        path, _ = self.run_file("kind", self.MOE, source='models = "a"')
        self.refused("train", path, words=["source.models", "list of strings"])


if __name__ == "__main__":
    tiny_run.UPCYCLE = os.path.abspath(sys.argv.pop(1))
    unittest.main()
