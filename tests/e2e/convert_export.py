#!/usr/bin/env python3
"""upcycle convert and upcycle export: what goes in comes out, bit for bit; transformers loads it; bad input is refused by name.
Usage: convert_export.py UPCYCLE [unittest arguments]"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

from check_schema import digest_of
from rank_server import served
from seal import seal

UPCYCLE = None
MPIRUN = os.environ.get("UPCYCLE_MPIRUN", "mpirun --oversubscribe --bind-to none --mca mpi_yield_when_idle 1").split()
COMMON = dict(vocab_size=211, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
              intermediate_size=48, max_position_embeddings=128, rope_theta=1e6, rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
              bos_token_id=1, eos_token_id=2)
MOE = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True, mlp_only_layers=[1])


def tensors_of(directory):
    out = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        loaded = load_file(file)
        assert not out.keys() & loaded.keys(), "a tensor in two shards"
        out |= loaded
    return out


def make_model(directory, dtype=torch.bfloat16, tied=True, moe=False, **config):
    """A seeded model as transformers saves it, with files that travel along."""
    torch.manual_seed(5)
    kind, settings = (Qwen3MoeForCausalLM, Qwen3MoeConfig) if moe else (Qwen3ForCausalLM, Qwen3Config)
    settings = settings(**COMMON | (MOE if moe else {}) | config, tie_word_embeddings=tied)
    model = kind(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + 0.05)
    model.to(dtype).save_pretrained(directory)   # and not used further: model.to() rounds RoPE's frequencies, too
    config = json.loads((directory / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "tokenizer_config.json").write_text('{"eos_token": "\u2581end"}')


class ConvertExport(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.root = Path(scratch.name)
        self.source = self.root / "source"

    def upcycle(self, *arguments, ranks=1, expect=0):
        launcher = [*MPIRUN, "-np", str(ranks)] if ranks > 1 else []
        result = subprocess.run([*launcher, served(UPCYCLE), *map(str, arguments)], capture_output=True, text=True, timeout=120)
        self.assertEqual(result.returncode, expect, result.stdout + result.stderr)
        return result.stdout + result.stderr

    def run_file(self, text="", directory="run", source=None):
        path = self.root / f"{directory}.toml"
        path.write_text(f'[run]\ndirectory = "{self.root / directory}"\ndevice = "cpu"\n[source]\nmodel = "{source or self.source}"\n{text}')
        return path

    def convert(self, directory="run", ranks=1):
        self.upcycle("convert", self.run_file(directory=directory), ranks=ranks)
        return self.root / directory / "checkpoints/step-00000000"

    def refused(self, *arguments, words, ranks=1):
        before = sorted(self.root.rglob("*"))
        said = self.upcycle(*arguments, ranks=ranks, expect=2)
        for word in words:
            self.assertIn(word, said)
        self.assertEqual(sorted(self.root.rglob("*")), before, "something was written")

    def assert_same_tensors(self, directory, expected):
        found = tensors_of(directory)
        self.assertEqual(found.keys(), expected.keys())
        for name, value in expected.items():
            self.assertEqual(found[name].dtype, value.dtype, name)
            self.assertTrue(torch.equal(found[name], value), name)

    def assert_loads(self, directory):
        """In transformers, with nothing missing or left over, and the source's logits."""
        loaded, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
        self.assertFalse(any(report.get(kind) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report)
        source = AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32)
        self.assertIs(type(loaded), type(source))
        tokens = torch.arange(40).reshape(2, 20) * 5 % COMMON["vocab_size"]
        with torch.no_grad():
            self.assertTrue(torch.equal(loaded(tokens).logits, source(tokens).logits))

    def test_round_trip(self):
        cases = [(torch.bfloat16, True, False), (torch.float32, False, False), (torch.float16, True, False), (torch.bfloat16, False, True)]
        for dtype, tied, moe in cases:
            with self.subTest(dtype=dtype, tied=tied, moe=moe):
                shutil.rmtree(self.source, ignore_errors=True)
                make_model(self.source, dtype, tied, moe)
                run, out = f"run-{dtype}-{moe}", self.root / f"out-{dtype}-{moe}"
                self.convert(run, ranks=3)
                self.upcycle("export", self.root / run, out)
                self.assert_same_tensors(out, tensors_of(self.source))
                self.assert_loads(out)
                for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
                    self.assertEqual((out / name).read_bytes(), (self.source / name).read_bytes())
                config = json.loads((out / "config.json").read_text())
                self.assertEqual(config["torch_dtype"], str(dtype).removeprefix("torch."))
                self.assertEqual(config["eos_token_id"], 2)
                self.assertEqual("num_experts" in config, moe)
                origin = json.loads((out / "upcycling.json").read_text())
                self.assertEqual(origin["provenance"]["source"]["path"], str(self.source))
                self.assertEqual(origin["provenance"]["source"]["files"]["model.safetensors"],
                                 (self.source / "model.safetensors").stat().st_size)

    def test_any_number_of_ranks_converts_to_the_same(self):
        make_model(self.source, vocab_size=50021, tied=False)   # more than a million elements: rows are shared out
        steps = [self.convert(f"run{ranks}", ranks) for ranks in (1, 2, 4)]
        for step in steps[1:]:
            self.assertEqual((step / "weights.h5").read_bytes(), (steps[0] / "weights.h5").read_bytes())

    def test_shards_and_index(self):
        make_model(self.source, moe=True)
        self.convert()
        out = self.root / "out"
        self.upcycle("export", self.root / "run", out, "--max-shard-size", "20KB")
        index = json.loads((out / "model.safetensors.index.json").read_text())
        shards = sorted(out.glob("*.safetensors"))
        self.assertGreater(len(shards), 5)
        seen = {}
        for shard in shards:
            with safe_open(shard, "pt") as file:
                self.assertEqual(file.metadata()["format"], "pt")
                seen |= {name: shard.name for name in file.keys()}
                size = sum(file.get_tensor(name).nbytes for name in file.keys())
                self.assertTrue(size <= 20000 or len(file.keys()) == 1, shard.name)
        self.assertEqual(index["weight_map"], seen)
        self.assertEqual(index["metadata"]["total_size"], sum(value.nbytes for value in tensors_of(out).values()))
        self.assert_same_tensors(out, tensors_of(self.source))
        self.assert_loads(out)
        sharded = self.root / "again"   # and a sharded directory is a source
        self.source = out
        self.convert("again-run", ranks=2)
        self.upcycle("export", self.root / "again-run", sharded)
        self.assert_same_tensors(sharded, tensors_of(out))

    def test_other_dtypes(self):
        make_model(self.source)
        self.convert()
        for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
            out = self.root / name
            self.upcycle("export", self.root / "run", out, "--dtype", name)
            self.assert_same_tensors(out, {key: value.to(dtype) for key, value in tensors_of(self.source).items()})

    def test_fused_experts_are_read(self):
        make_model(self.source, moe=True)
        separate = tensors_of(self.source)
        fused = {name: value for name, value in separate.items() if ".experts." not in name}
        for layer in (0, 2):
            stem = f"model.layers.{layer}.mlp.experts"
            take = lambda matrix: torch.stack([separate[f"{stem}.{e}.{matrix}_proj.weight"] for e in range(6)])
            fused[stem + ".gate_up_proj"] = torch.cat([take("gate"), take("up")], 1).contiguous()
            fused[stem + ".down_proj"] = take("down")
        save_file(fused, self.source / "model.safetensors", {"format": "pt"})
        self.convert()
        self.upcycle("export", self.root / "run", self.root / "out")
        self.assert_same_tensors(self.root / "out", separate)

    def test_redundant_head_of_a_tied_model(self):
        make_model(self.source)
        expected = tensors_of(self.source)
        file = self.source / "model.safetensors"
        save_file(expected | {"lm_head.weight": expected["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
        self.convert()
        self.upcycle("export", self.root / "run", self.root / "out")
        self.assert_same_tensors(self.root / "out", expected)
        other = expected["model.embed_tokens.weight"].clone()
        other[200, 3] += 1
        save_file(expected | {"lm_head.weight": other}, file, {"format": "pt"})
        self.refused("convert", self.run_file(directory="other"), words=["lm_head.weight differs from model.embed_tokens.weight"])

    def test_upcycled_model(self):
        """Grown at step 0: each expert is its shard times a power of two, and transformers gives the dense model's logits."""
        make_model(self.source)
        dense_model = AutoModelForCausalLM.from_pretrained(self.source, dtype=torch.float32)
        dense = tensors_of(self.source)
        settings = """
[moe]
experts = 8
top_k = 4
granularity = 4
[train]
steps = 1
sequence = 32
global_batch = 4
precision = "bf16"
[optimizer]
schedule = "constant"
[data]
train = "mock"
"""
        self.upcycle("train", self.run_file(settings), ranks=2)
        self.upcycle("export", self.root / "run/checkpoints/step-00000000", self.root / "out")
        grown = tensors_of(self.root / "out")
        self.assertEqual(len(grown), len(dense) + 3 * (8 * 3 + 1 - 3))
        for layer in range(3):
            stem = f"model.layers.{layer}.mlp."
            for e in range(8):
                rows = slice(e % 4 * 12, e % 4 * 12 + 12)
                self.assertTrue(torch.equal(grown[f"{stem}experts.{e}.gate_proj.weight"], dense[stem + "gate_proj.weight"][rows]))
                self.assertTrue(torch.equal(grown[f"{stem}experts.{e}.up_proj.weight"], 2 * dense[stem + "up_proj.weight"][rows]))
                self.assertTrue(torch.equal(grown[f"{stem}experts.{e}.down_proj.weight"], 2 * dense[stem + "down_proj.weight"][:, rows]))
                self.assertTrue(torch.equal(grown[stem + "gate.weight"][e], grown[stem + "gate.weight"][e // 4 * 4]))
        loaded = AutoModelForCausalLM.from_pretrained(self.root / "out", dtype=torch.float32)
        tokens = torch.arange(60).reshape(2, 30) * 7 % COMMON["vocab_size"]
        with torch.no_grad():
            ours, reference = loaded(tokens).logits, dense_model(tokens).logits
        self.assertLess(((ours - reference).norm() / reference.norm()).item(), 1e-5)
        # After a step the masters differ from the stored bf16; fp32 is exported from them.
        self.upcycle("export", self.root / "run", self.root / "fp32", "--dtype", "fp32")
        self.upcycle("export", self.root / "run", self.root / "bf16")
        fine, coarse = tensors_of(self.root / "fp32"), tensors_of(self.root / "bf16")
        for name, value in fine.items():
            self.assertTrue(torch.equal(value.to(torch.bfloat16), coarse[name]), name)
        self.assertTrue(any(not torch.equal(value.to(torch.bfloat16).float(), value) for value in fine.values()))

    def test_merged_back_to_dense(self):
        """What was just grown is, merged, the source bit for bit; other factors leave rounding; what no recipe describes is refused."""
        for dtype, precision in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
            shutil.rmtree(self.source, ignore_errors=True)
            make_model(self.source, dtype, tied=dtype is torch.bfloat16)
            for order, granularity, ranks in (("identity", 4, 1), ("random", 2, 2), ("clusters", 4, 2), ("random", 1, 1)):
                with self.subTest(dtype=dtype, order=order, granularity=granularity):
                    run, out = f"{precision}-{order}-{granularity}", self.root / f"{precision}-{order}-{granularity}-dense"
                    self.grow(run, granularity, precision, f'permutation = "{order}"', ranks)
                    self.upcycle("export", self.root / run, out, "--dense")
                    self.assert_same_tensors(out, tensors_of(self.source))
                    self.assert_loads(out)
                    config = json.loads((out / "config.json").read_text())
                    self.assertEqual((config["architectures"], config["model_type"]), (["Qwen3ForCausalLM"], "qwen3"))
                    self.assertFalse({"num_experts", "moe_intermediate_size", "num_experts_per_tok", "mlp_only_layers"} & config.keys())
                    self.assertIn("2 copies", json.loads((out / "upcycling.json").read_text())["merged"])
        # A run that takes a mixture as it is knows its recipe, too.
        self.grow("taken", 4, "fp32", "", 1, source=self.root / "fp32-clusters-4", moe=False)
        self.upcycle("export", self.root / "taken", self.root / "taken-dense", "--dense")
        self.assert_same_tensors(self.root / "taken-dense", tensors_of(self.source))
        self.grow("cube", 4, "fp32", 'scaling = "cube-root"', 1)
        self.upcycle("export", self.root / "cube", self.root / "cube-dense", "--dense")
        for name, value in tensors_of(self.source).items():
            self.assertTrue(torch.allclose(tensors_of(self.root / "cube-dense")[name], value, rtol=1.2e-7, atol=0), name)

        self.convert("dense")
        self.refused("export", self.root / "dense", self.root / "x", "--dense", words=["is dense already"])
        shutil.rmtree(self.source)
        make_model(self.source, moe=True)
        self.convert("foreign")
        self.refused("export", self.root / "foreign", self.root / "x", "--dense", words=["--dense", "no recipe", "not grown"])
        clusters = self.root / "fp32-clusters-4/checkpoints/step-00000000/clusters.json"
        clusters.write_text(clusters.read_text().replace("[", "{", 1))
        seal(clusters.parent)
        self.refused("export", self.root / "fp32-clusters-4", self.root / "x", "--dense", words=["clusters.json", "hidden units of layer 0"])

    def grow(self, directory, granularity, precision, upcycle, ranks, source=None, moe=True):
        """Two copies, nothing trained."""
        moe = f"[moe]\nexperts = {2 * granularity}\ntop_k = {granularity}\ngranularity = {granularity}\n" if moe else ""
        parallel = "[parallel]\nexpert = 2\ntensor = 2\n" if ranks == 2 else ""
        path = self.run_file(f'{moe}[upcycle]\n{upcycle}\n{parallel}[data]\ntrain = "mock"\n[train]\nsteps = 0\nsequence = 16\n'
                             f'global_batch = 2\nprecision = "{precision}"\n', directory, source)
        self.upcycle("train", path, ranks=ranks)

    def test_all_wrong_tensors_are_listed_at_once(self):
        make_model(self.source)
        tensors = tensors_of(self.source)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(4, dtype=torch.bfloat16)
        tensors["model.norm.weight"] = torch.ones(31, dtype=torch.bfloat16)
        tensors["model.layers.2.mlp.down_proj.weight"] = tensors["model.layers.2.mlp.down_proj.weight"].to(torch.float16)
        save_file(tensors, self.source / "model.safetensors", {"format": "pt"})
        self.refused("convert", self.run_file(), ranks=2, words=[
            "4 tensors", "missing: model.layers.1.mlp.up_proj.weight [48, 32]", "surplus: model.layers.0.self_attn.q_proj.bias [4]",
            "wrong shape: model.norm.weight is [31], expected [32]",
            "wrong dtype: model.layers.2.mlp.down_proj.weight is float16, config.json says bfloat16"])

    def test_bad_sources_are_refused(self):
        make_model(self.source)
        run = self.run_file()
        self.refused("convert", run, "--set", "source.model=", "source.architecture=" + str(self.source / "config.json"),
                     words=["source.model is missing"])
        self.refused("convert", run, "--set", f"source.model={self.root / 'nowhere'}", words=["nowhere", "not a directory"])
        (self.root / "empty").mkdir()
        self.refused("convert", run, "--set", f"source.model={self.root / 'empty'}", words=["neither a Hugging Face directory"])
        self.refused("convert", run, "--set", f"source.tokenizer={self.root / 'empty'}", words=["source.tokenizer", "no tokenizer files"])
        config = json.loads((self.source / "config.json").read_text())
        (self.source / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
        self.refused("convert", run, words=["config.json", "llama"])
        (self.source / "config.json").write_text(json.dumps(config))
        self.convert()
        self.refused("convert", run, words=["has a checkpoint", "step-00000000"])
        self.refused("convert", self.run_file(directory="second", source=self.root / "run"), words=["is a checkpoint already"])

    def test_bad_exports_are_refused(self):
        make_model(self.source)
        step = self.convert()
        run, out = self.root / "run", self.root / "out"
        self.refused("export", self.source, out, words=["not a checkpoint"])
        self.refused("export", self.root / "nowhere", out, words=["nowhere"])
        self.refused("export", run, self.source, words=["holds files already"])
        self.refused("export", run, self.source / "config.json", words=["is a file"])
        self.refused("export", run, run / "run.toml" / "below", words=["can't be made"])
        self.refused("export", run, out, "--dtype", "int8", words=["--dtype", "int8"])
        self.refused("export", run, out, "--max-shard-size", "5 bananas", words=["--max-shard-size", "no size"])
        manifest = json.loads((step / "manifest.json").read_text())
        rewrite = lambda content: (step / "manifest.json").write_text(json.dumps(content | {"digest": digest_of(content)}))
        changed = manifest | {"run": manifest["run"] | {"balance": manifest["run"]["balance"] | {"capacity_factor": 1.25}}}
        rewrite(changed)
        self.refused("export", run, out, words=["balance.capacity_factor = 1.25", "dropped", "qwen3_moe"])
        routers = {"0": {"bias": [0.0, 0.0], "count": [3, 5]}, "1": {"bias": [0.0, -0.001]}}   # a bias of zeros is none
        rewrite(manifest | {"training": {"routers": routers}})
        self.refused("export", run, out, words=["router of layer 1", "balance.bias_rate", "qwen3_moe"])
        rewrite(manifest)
        out.mkdir()   # an empty directory is fine
        self.upcycle("export", run, out)
        self.assert_same_tensors(out, tensors_of(self.source))
        self.assertFalse((self.root / "out.partial").exists())


if __name__ == "__main__":
    logging.disable_progress_bar()
    UPCYCLE = os.path.abspath(sys.argv.pop(1))
    unittest.main()
