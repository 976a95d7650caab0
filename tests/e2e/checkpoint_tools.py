#!/usr/bin/env python3
"""upcycle inspect, upcycle verify and checkpoints-schema/ on checkpoints that convert made: good ones pass, damage is named.
Usage: checkpoint_tools.py UPCYCLE [unittest arguments]"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import h5py
import torch
from check_schema import check, digest_of, texts_of
from rank_server import served
from safetensors.torch import save_file

UPCYCLE = None
CONFIG = dict(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", vocab_size=61, hidden_size=32, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=48, max_position_embeddings=128, rope_theta=1e6,
              rms_norm_eps=1e-6, hidden_act="silu", attention_bias=False, tie_word_embeddings=False, torch_dtype="bfloat16", num_experts=4,
              num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[1])


def make_source(directory):
    """A MoE as the hub has it: bfloat16, experts one by one."""
    torch.manual_seed(7)
    hidden, heads, kv, ffn, expert = 32, 4 * 16, 2 * 16, 48, 24
    shapes = {"model.embed_tokens.weight": [61, hidden], "lm_head.weight": [61, hidden], "model.norm.weight": [hidden]}
    for layer in range(2):
        at = f"model.layers.{layer}."
        shapes |= {at + "input_layernorm.weight": [hidden], at + "post_attention_layernorm.weight": [hidden],
                   at + "self_attn.q_proj.weight": [heads, hidden], at + "self_attn.k_proj.weight": [kv, hidden],
                   at + "self_attn.v_proj.weight": [kv, hidden], at + "self_attn.o_proj.weight": [hidden, heads],
                   at + "self_attn.q_norm.weight": [16], at + "self_attn.k_norm.weight": [16]}
        width, places = (ffn, [at + "mlp."]) if layer == 1 else (expert, [f"{at}mlp.experts.{e}." for e in range(4)])
        for place in places:
            shapes |= {place + "gate_proj.weight": [width, hidden], place + "up_proj.weight": [width, hidden], place + "down_proj.weight": [hidden, width]}
    shapes["model.layers.0.mlp.gate.weight"] = [4, hidden]
    tensors = {name: torch.randn(shape).to(torch.bfloat16) for name, shape in shapes.items()}
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG))
    (directory / "tokenizer.json").write_text("{}")
    return tensors


class CheckpointTools(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.scratch = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.scratch.cleanup)
        root = Path(cls.scratch.name)
        cls.source = make_source(root / "source")
        run = root / "run.toml"
        run.write_text(f'[run]\ndirectory = "{root / "run"}"\n[source]\nmodel = "{root / "source"}"\n')
        subprocess.run([served(UPCYCLE), "convert", run], check=True, capture_output=True, timeout=120)
        cls.good = root / "run/checkpoints/step-00000000"

    def setUp(self):
        self.run_directory = Path(tempfile.mkdtemp(dir=self.scratch.name))
        self.step = self.run_directory / "checkpoints/step-00000000"
        shutil.copytree(self.good, self.step)

    def upcycle(self, *arguments, expect=0):
        result = subprocess.run([served(UPCYCLE), *map(str, arguments)], capture_output=True, text=True, timeout=120)
        self.assertEqual(result.returncode, expect, result.stdout + result.stderr)
        return result.stdout if expect == 0 else result.stdout + result.stderr

    def manifest(self, **changes):
        path = self.step / "manifest.json"
        manifest = json.loads(path.read_text()) | changes
        manifest["files"] = {str(p.relative_to(self.step)): p.stat().st_size for p in self.step.rglob("*") if p.is_file() and p != path}
        manifest["texts"] = texts_of(self.step)
        path.write_text(json.dumps(manifest | {"digest": digest_of(manifest)}))

    def assert_bad(self, *words):
        said = self.upcycle("verify", self.step, expect=1)
        for word in words:
            self.assertIn(word, said)
        told = json.loads(self.upcycle("verify", self.step, "--json", expect=1).split("\nupcycle:")[0])
        self.assertEqual(told["verdict"], "bad")
        self.assertTrue(told["problems"])

    def test_schema_and_values(self):
        self.assertEqual(check(self.good), [])
        with h5py.File(self.good / "weights.h5") as file:
            for name, value in self.source.items():
                if ".experts." in name:
                    place, expert, rest = name.partition(".experts.")[0], *name.partition(".experts.")[2].split(".", 1)
                    stored = file[f"{place}.experts.{rest}".replace(".", "/")].astype("float32")[int(expert)]
                else:
                    stored = file[name.replace(".", "/")].astype("float32")[...]
                self.assertTrue(torch.equal(torch.from_numpy(stored), value.float()), name)

    def test_tensors_divided_among_files(self):
        run = self.run_directory / "run.toml"
        run.write_text((self.good.parents[2] / "run.toml").read_text().replace(str(self.good.parents[1]), str(self.run_directory / "divided"))
                       + "[checkpoint]\nfile_size = 2e-5\n")
        self.upcycle("convert", run)
        step = self.run_directory / "divided/checkpoints/step-00000000"
        self.assertGreater(len(list(step.glob("weights-*.h5"))), 3)
        self.assertEqual(check(step), [])

        # As the schema's README reads a checkpoint.
        def datasets(group):
            for item in group.values():
                yield from datasets(item) if isinstance(item, h5py.Group) else [item]

        with h5py.File(step / "weights.h5") as index, h5py.File(self.good / "weights.h5") as whole:
            divided, together = ({d.attrs["name"].decode(): d.astype("float32")[...] for d in datasets(file) if "name" in d.attrs}
                                 for file in (index, whole))
        self.assertEqual(divided.keys(), together.keys())
        for name, value in together.items():
            self.assertEqual(divided[name].tobytes(), value.tobytes(), name)

        # A link that leads elsewhere is seen.
        with h5py.File(step / "weights.h5", "r+") as file:
            del file["model/norm/weight"]
            file["model/norm/weight"] = h5py.ExternalLink("weights-00001-of-00002.h5", "/model/norm/weight")
        self.assertIn("weights.h5: its links are", "\n".join(check(step)))

    def test_h5dump_reads_what_is_trained(self):
        """Every file, all values; of tensors divided among files the index, too."""
        for name, extra in (("whole", ""), ("divided", "[checkpoint]\nfile_size = 2e-5\n")):
            run = self.run_directory / f"{name}.toml"
            run.write_text(f'[run]\ndirectory = "{self.run_directory / name}"\ndevice = "cpu"\n[source]\nmodel = "{self.source_directory()}"\n'
                           f'[data]\ntrain = "mock"\n[train]\nsteps = 1\nsequence = 16\nglobal_batch = 2\n[optimizer]\nschedule = "constant"\nlr = 1e-3\n{extra}')
            self.upcycle("train", run)
            step = self.run_directory / f"{name}/checkpoints/step-00000001"
            self.assertEqual(check(step), [])
            files = sorted(step.glob("*.h5"))
            kinds = [file for file in files if "-of-" not in file.name]
            self.assertEqual([file.name for file in kinds], ["exp_avg.h5", "exp_avg_sq.h5", "masters.h5", "weights.h5"])
            self.assertEqual(len(files) > 2 * len(kinds), name == "divided")
            for file in files:
                dumped = subprocess.run(["h5dump", file], capture_output=True, text=True, timeout=60)
                self.assertEqual((dumped.returncode, dumped.stderr), (0, ""), file.name)
                with h5py.File(file) as opened:
                    named = list(self.names(opened))
                for tensor in named:
                    self.assertIn(f'(0): "{tensor}"', dumped.stdout, file.name)
                self.assertGreater(len(named), 0, file.name)
                self.assertEqual(dumped.stdout.count('DATASET ".checksums"'), int(file not in kinds or name == "whole"), file.name)
                self.assertEqual(dumped.stdout.count("EXTERNAL_LINK"), len(named) if file in kinds and name == "divided" else 0, file.name)

    @classmethod
    def names(cls, group):
        for item in group.values():
            if isinstance(item, h5py.Group):
                yield from cls.names(item)
            elif "name" in item.attrs:
                yield item.attrs["name"].decode()

    def test_the_schema_check_sees_damage(self):
        self.manifest(step=-1, surprise=1, layout={"ranks": 0}, training=3)
        problems = "\n".join(check(self.step))
        for word in ("manifest.json.step: -1 is below 0", "manifest.json.layout.ranks", "manifest.json.training: 3 is no object"):
            self.assertIn(word, problems)
        with h5py.File(self.step / "weights.h5", "r+") as file:
            file["surplus"] = [1.0]
            del file["model/norm/weight"].attrs["dtype"]
        problems = "\n".join(check(self.step))
        for word in ("weights.h5: surplus: float", "weights.h5: model.norm.weight: attributes ['name']", "the manifest says", "files:"):
            self.assertIn(word, problems)

    def test_good(self):
        for path in (self.step, self.run_directory):
            told = json.loads(self.upcycle("verify", path, "--json"))
            self.assertEqual((told["verdict"], told["problems"], told["certificate"]), ("good", [], "none"))
            self.assertEqual(told["values"], sum(value.numel() for value in self.source.values()))
            self.assertEqual(len(told["digest"]), 32)
            self.assertIn("good", self.upcycle("verify", path))

    def test_a_flipped_bit_is_named(self):
        first = json.loads(self.upcycle("verify", self.step, "--json"))["digest"]
        self.patch("model/layers/1/mlp/up_proj/weight", b"\x80\x3f")
        told = json.loads(self.upcycle("verify", self.step, "--json", expect=1).split("\nupcycle:")[0])
        self.assertNotEqual(told["digest"], first)
        self.assertIn("tensor 'model.layers.1.mlp.up_proj.weight' (layer 1), elements 0 to 1535", told["problems"][0])
        self.assertIn("are not what was written", told["problems"][0])
        self.assertIn("its tensors or checksums are not those of the manifest", told["problems"][1])
        self.assertEqual(len(told["problems"]), 2)

    def test_inspect(self):
        total = sum(value.numel() for value in self.source.values())
        for path in (self.step, self.run_directory):
            told = json.loads(self.upcycle("inspect", path, "--json"))
            self.assertEqual(told["parameters"]["total"], total)
            self.assertEqual(told["parameters"]["active"], total - 2 * 3 * 24 * 32)
            experts = told["tensors"]["weights.h5"]["model.layers.0.mlp.experts.up_proj.weight"]
            self.assertEqual((experts["dtype"], experts["shape"], len(experts["checksum"])), ("bfloat16", [4, 24, 32], 32))
            self.assertEqual(told["tensors"]["weights.h5"]["model.layers.0.mlp.gate.weight"]["dtype"], "float32")
            said = self.upcycle("inspect", path)
            for word in ("Qwen3-MoE", "4 experts", f"{total} total", "model.layers.*.self_attn.q_proj.weight", "[64, 32]  x 2", "weights.h5", "certificate"):
                self.assertIn(word, said)

    def patch(self, dataset, value):
        """Overwrites the first bytes of a dataset, past HDF5."""
        with h5py.File(self.step / "weights.h5") as file:
            offset = file[dataset].id.get_offset()
        with open(self.step / "weights.h5", "r+b") as raw:
            raw.seek(offset)
            raw.write(value)

    def test_values_that_are_not_finite(self):
        self.patch("model/layers/1/mlp/up_proj/weight", b"\xc0\x7f")
        self.assert_bad("weights.h5: tensor 'model.layers.1.mlp.up_proj.weight' has values that are not finite")
        self.patch("model/layers/0/mlp/gate/weight", b"\x00\x00\x80\x7f")
        self.assert_bad("model.layers.0.mlp.gate.weight")

    def test_wrong_tensors(self):
        with h5py.File(self.step / "weights.h5", "r+") as file:
            del file["model/norm/weight"]
            file["model/surplus/weight"] = torch.zeros(3).numpy()
            del file["model/layers/0/input_layernorm/weight"]
            file["model/layers/0/input_layernorm/weight"] = torch.zeros(33).numpy()
            del file["model/layers/1/input_layernorm/weight"]
            file["model/layers/1/input_layernorm/weight"] = torch.zeros(32, dtype=torch.int64).numpy()
        self.manifest()
        self.assert_bad("tensor 'model.norm.weight' is missing", "'model.surplus.weight' belongs to no parameter",
                        "'model.layers.0.input_layernorm.weight' has shape [33], its architecture says [32]",
                        "'model.layers.1.input_layernorm.weight' is Long", "but the manifest says")

    def test_wrong_router_dtype_and_foreign_types(self):
        with h5py.File(self.step / "weights.h5", "r+") as file:
            router = file["model/layers/0/mlp/gate/weight"][...]
            del file["model/layers/0/mlp/gate/weight"]
            dataset = file.create_dataset("model/layers/0/mlp/gate/weight", router.shape, dtype=file["model/norm/weight"].id.get_type())
            dataset.id.write(h5py.h5s.ALL, h5py.h5s.ALL, router)
        self.manifest()
        self.assert_bad("'model.layers.0.mlp.gate.weight' is BFloat16, not Float")
        with h5py.File(self.step / "weights.h5", "r+") as file:
            file["double"] = torch.zeros(1, dtype=torch.float64).numpy()
        self.manifest()
        self.assert_bad("tensor 'double': its type is none of float32, bfloat16 and int64")

    def test_wrong_files(self):
        shutil.copy(self.step / "weights.h5", self.step / "exp_avg.h5")
        shutil.copy(self.step / "weights.h5", self.step / "extra.h5")
        self.manifest()
        self.assert_bad("only one of exp_avg.h5 and exp_avg_sq.h5", "extra.h5 is no file of a checkpoint", "exp_avg.h5: tensor 'lm_head.weight' is BFloat16, not Float")
        for name in ("exp_avg.h5", "extra.h5", "weights.h5"):
            (self.step / name).unlink()
        self.assert_bad("exp_avg.h5: No such file")
        self.manifest()
        self.assert_bad("weights.h5 is missing")

    def test_truncated(self):
        weights = self.step / "weights.h5"
        weights.write_bytes(weights.read_bytes()[:-100])
        self.assert_bad("weights.h5: has", "but the manifest says")
        self.upcycle("inspect", self.step, expect=2)
        self.assertIn("but the manifest says", self.upcycle("verify", self.run_directory, expect=2))
        weights.write_bytes(b"x" * 1000)
        self.manifest()
        self.assert_bad("weights.h5", "signature")

    def test_certificate(self):
        certificate = self.step / "certificate.json"
        for content, code, word in (('{"verdict": "passed", "expected": "exact"}', 0, "passed"), ('{"verdict": "failed", "objections": ["mismatch"]}', 1, "mismatch"),
                                    ("{}", 1, "no verdict"), ("garbage", 1, "no verdict")):
            certificate.write_text(content)
            self.manifest()
            self.assertIn(word, self.upcycle("verify", self.step, expect=code))
            self.upcycle("inspect", self.step)

    def test_what_cannot_be_judged(self):
        self.manifest(schema_version=99)
        for command in ("inspect", "verify"):
            self.assertIn("schema version 99, but this program reads versions 1 to 3", self.upcycle(command, self.step, expect=2))
            for path in (self.run_directory / "absent", self.source_directory(), self.run_directory):
                self.upcycle(command, path, expect=2)
        (self.step / "manifest.json").write_text("{")
        self.assertIn("not valid JSON", self.upcycle("verify", self.step, expect=2))
        self.manifest_of_another_model()
        for command in ("inspect", "verify"):
            self.assertIn("llama", self.upcycle(command, self.step, expect=2))

    def source_directory(self):
        return Path(self.scratch.name) / "source"

    def manifest_of_another_model(self):
        shutil.copy(self.good / "manifest.json", self.step / "manifest.json")
        self.manifest(architecture={"architectures": ["LlamaForCausalLM"], "model_type": "llama"})


if __name__ == "__main__":
    UPCYCLE = os.path.abspath(sys.argv.pop(1))
    unittest.main()
