#!/usr/bin/env python3
"""upcycle sample: what transformers would say, from every kind of directory, the same on any number of ranks; and what it refuses.
Usage: sample.py UPCYCLE [unittest arguments]"""
import json
import os
import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

import torch
from rank_server import served
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.utils import logging

UPCYCLE = None
MPIRUN = os.environ.get("UPCYCLE_MPIRUN", "mpirun --oversubscribe --bind-to none --mca mpi_yield_when_idle 1").split()
VOCAB, POSITIONS = 340, 96
COMMON = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
              intermediate_size=48, max_position_embeddings=POSITIONS, rope_parameters={"rope_theta": 1e6, "rope_type": "default"},
              tie_word_embeddings=True, attn_implementation="eager", experts_implementation="eager")
MOE = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True, mlp_only_layers=[1])
PROMPT = "Das größte Übel: 日本 🦜 says"


def make_tokenizer(directory, size=VOCAB - 20):
    """Byte-level BPE whose merges cut through characters; the last id ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<end>"])
    tokenizer.train_from_iterator([PROMPT * 3, "日月火水木金土 größer 🦜🦚🦩 the parrot says that they say"] * 4, trainer)
    tokenizer.add_tokens([f"<{i}>" for i in range(tokenizer.get_vocab_size(), size)])   # the texts have not that many pieces
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer


def make_model(directory, moe, seed=5, **config):
    """A seeded model whose likeliest tokens stand out, as transformers saves it."""
    torch.manual_seed(seed)
    kind, settings = (Qwen3MoeForCausalLM, Qwen3MoeConfig) if moe else (Qwen3ForCausalLM, Qwen3Config)
    model = kind(settings(**COMMON | (MOE if moe else {}) | config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            draw = torch.randn_like(parameter)
            parameter.copy_(1 + 0.2 * draw if "norm" in name else 2 * draw / parameter.shape[-1] ** 0.5)
    model.save_pretrained(directory)
    path = directory / "config.json"
    saved = json.loads(path.read_text())
    saved.pop("experts_implementation", None)
    path.write_text(json.dumps(saved))
    return make_tokenizer(directory)


class Sample(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        scratch = tempfile.TemporaryDirectory()
        cls.addClassCleanup(scratch.cleanup)
        cls.root = Path(scratch.name)
        cls.dense, cls.moe = cls.root / "dense", cls.root / "moe"
        cls.tokenizer = make_model(cls.dense, moe=False)
        make_model(cls.moe, moe=True)
        cls.run_file = cls.root / "run.toml"   # 8 experts out of the dense model, trained for a few steps
        cls.run_directory = cls.root / "run"
        cls.run_file.write_text(f'[run]\ndirectory = "{cls.run_directory}"\ndevice = "cpu"\n[source]\nmodel = "{cls.dense}"\n'
                                '[moe]\nexperts = 8\ntop_k = 2\n[data]\ntrain = "mock"\n[optimizer]\nlr = 1e-2\nschedule = "constant"\n'
                                '[train]\nsteps = 3\nsequence = 16\nglobal_batch = 4\nprecision = "fp32"\n')
        subprocess.run([served(UPCYCLE), "train", cls.run_file], check=True, capture_output=True, timeout=200)
        cls.exported = cls.root / "exported"
        subprocess.run([served(UPCYCLE), "export", cls.run_directory, cls.exported, "--dtype", "fp32"], check=True, capture_output=True, timeout=200)

    def call(self, *arguments, ranks=1, expect=0):
        launcher = [*MPIRUN, "-np", str(ranks)] if ranks > 1 else []
        result = subprocess.run([*launcher, served(UPCYCLE), "sample", *map(str, arguments)], capture_output=True, timeout=120)
        self.assertEqual(result.returncode, expect, result.stdout + result.stderr)
        return result

    def sample(self, model, *arguments, ranks=1, prompt=PROMPT):
        return json.loads(self.call(model, "--prompt", prompt, "--device", "cpu", "--json", *arguments, ranks=ranks).stdout)

    def greedy(self, directory, tokens):
        """What transformers' generate says, ids of the continuation."""
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
        ids = torch.tensor([self.tokenizer.encode(PROMPT).ids])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0)
        return out[0, ids.shape[1]:].tolist()

    def test_greedy_is_what_transformers_says(self):
        for model, reference in ((self.dense, self.dense), (self.moe, self.moe), (self.exported, self.exported), (self.run_directory, self.exported)):
            with self.subTest(model=model.name):
                expected = self.greedy(reference, 40)
                self.assertEqual(len(expected), 40)
                self.assertGreater(len(set(expected)), 4, "a text of few tokens proves little")
                for ranks in (1, 2) if model in (self.moe, self.run_directory) else (1,):
                    said = self.sample(model, "--tokens", 40, ranks=ranks)
                    self.assertEqual(said["prompt_tokens"], self.tokenizer.encode(PROMPT).ids)
                    self.assertEqual(said["samples"][0]["tokens"], expected)
                    self.assertEqual(said["samples"][0]["text"], self.tokenizer.decode(expected, skip_special_tokens=False))
                    self.assertEqual(said["samples"][0]["ended_by"], "tokens")

    def test_step_zero_of_an_exact_run_says_what_the_dense_model_says(self):
        self.assertEqual(self.sample(self.run_directory / "checkpoints/step-00000000", "--tokens", 40)["samples"],
                         self.sample(self.dense, "--tokens", 40)["samples"])

    def test_ends_where_transformers_ends(self):
        free = self.greedy(self.moe, 40)
        model = self.root / "ending"
        shutil.copytree(self.moe, model)
        config = json.loads((model / "generation_config.json").read_text())
        (model / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [free[12], VOCAB - 1]}))
        expected = self.greedy(model, 40)
        self.assertLess(len(expected), 14)
        for ranks in (1, 3):
            said = self.sample(model, "--tokens", 40, ranks=ranks)["samples"][0]
            self.assertEqual(said["tokens"] + [free[12]], expected)
            self.assertEqual(said["ended_by"], "end token")

    def test_a_seed_is_a_text_on_any_number_of_ranks(self):
        options = ("--tokens", 30, "--temperature", 1.5, "--top-p", 0.95, "--samples", 3)
        one = self.sample(self.moe, *options, "--seed", 7)
        for ranks in (2, 4):
            self.assertEqual(self.sample(self.moe, *options, "--seed", 7, ranks=ranks), one, ranks)
        texts = [sample["text"] for sample in one["samples"] + self.sample(self.moe, *options, "--seed", 8)["samples"]]
        self.assertEqual(len(set(texts)), 6)

    def test_prints_the_text(self):
        said = self.sample(self.moe, "--tokens", 20, "--temperature", 1.5, "--samples", 2)["samples"]
        plain = self.call(self.moe, "--prompt", PROMPT, "--device", "cpu", "--tokens", 20, "--temperature", 1.5, "--samples", 2, ranks=2).stdout.decode()
        self.assertEqual(plain, "".join(f"--- sample {i + 1} of 2\n{PROMPT}{each['text']}\n" for i, each in enumerate(said)))
        file = self.root / "prompt.txt"
        file.write_text(PROMPT)
        plain = self.call(self.moe, "--prompt-file", file, "--device", "cpu", "--tokens", 20).stdout.decode()
        self.assertEqual(plain, PROMPT + self.sample(self.moe, "--tokens", 20)["samples"][0]["text"] + "\n")

    def test_routing(self):
        """The router's word is that of transformers at the position before each token."""
        said = self.sample(self.moe, "--tokens", 12, "--routing", ranks=2)
        model = AutoModelForCausalLM.from_pretrained(self.moe, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
        ids = said["prompt_tokens"] + said["samples"][0]["tokens"]
        with torch.no_grad():
            logits = model(torch.tensor([ids]), output_router_logits=True).router_logits
        routing = said["samples"][0]["routing"]
        self.assertEqual([each["token"] for each in routing], said["samples"][0]["tokens"])
        for i, token in enumerate(routing):
            self.assertEqual([layer["layer"] for layer in token["layers"]], [0, 2])
            for layer, of_layer in zip(token["layers"], logits):
                best = of_layer[len(said["prompt_tokens"]) - 1 + i].float().softmax(-1).topk(2)
                self.assertEqual(layer["experts"], best.indices.tolist())
                for weight, expected in zip(layer["weights"], (best.values / best.values.sum()).tolist()):
                    self.assertAlmostEqual(weight, expected, places=4)
        plain = self.call(self.moe, "--prompt", PROMPT, "--device", "cpu", "--tokens", 12, "--routing").stdout.decode()
        self.assertRegex(plain, rf"token 1  {routing[0]['token']}  \".*\"\n  layer   0   +{routing[0]['layers'][0]['experts'][0]} 0\.\d\d\d")

    def test_stops_where_the_models_positions_end(self):
        said = self.sample(self.dense, "--tokens", 500)
        self.assertEqual(len(said["prompt_tokens"]) + len(said["samples"][0]["tokens"]), POSITIONS)
        self.assertEqual(said["samples"][0]["ended_by"], "positions")

    def test_an_installed_program_takes_the_script_beside_it(self):
        prefix = self.root / "prefix"
        for folder in ("bin", "libexec/upcycle"):
            (prefix / folder).mkdir(parents=True)
        shutil.copy(UPCYCLE, prefix / "bin")
        arguments = [prefix / "bin/upcycle", "sample", self.dense, "--prompt", "x", "--device", "cpu", "--tokens", "1"]
        for script, code, word in ((None, 0, "x"), ("print('{\"error\": \"the one beside it\"}')", 2, "upcycle: the one beside it"),
                                   ("import sys; sys.exit('no way')", 2, "libexec/upcycle/tokens " + str(self.dense) + " ended (exit code 1):\nno way")):
            if script:
                (prefix / "libexec/upcycle/tokens").write_text(script)
            result = subprocess.run(arguments, capture_output=True, text=True, timeout=120)
            self.assertEqual(result.returncode, code, result.stderr)
            self.assertIn(word, result.stdout + result.stderr)

    def test_refusals(self):
        bare, large, bad = self.root / "bare", self.root / "large", self.root / "bad"
        for directory in (bare, large, bad):
            if not directory.exists():
                shutil.copytree(self.dense, directory)
        (bare / "tokenizer.json").unlink()
        make_tokenizer(large, VOCAB + 1)
        (bad / "tokenizer.json").write_text("{")
        some = ("--prompt", "x", "--device", "cpu")
        for arguments, message in (
                ([self.root / "absent", *some], "absent: no such directory"),
                ([self.root, *some], "neither a Hugging Face directory (no config.json) nor a valid checkpoint"),
                ([self.dense], "no prompt: --prompt TEXT or --prompt-file FILE"),
                ([self.dense, "--prompt", "x", "--prompt-file", "y"], "both given"),
                ([self.dense, "--prompt-file", self.root / "absent"], "absent: can't be read"),
                ([self.dense, "--prompt-file", "/dev/null"], "the prompt is empty"),
                ([self.dense, "--prompt", "日" * POSITIONS], f"but the model has max_position_embeddings = {POSITIONS}"),
                ([bare, *some], "bare: no tokenizer.json there; --tokenizer DIR"),
                ([large, *some], f"but the model's vocabulary has {VOCAB}"),
                ([bad, *some], "bad/tokenizer.json: not a tokenizer"),
                ([self.dense, *some, "--tokenizer", self.root / "absent"], "absent: no tokenizer.json there"),
                ([self.dense, *some, "--top-p", "0"], "--top-p 0: a number above 0 and up to 1 is expected"),
                ([self.dense, *some, "--top-p", "1.5"], "--top-p 1.5: a number above 0 and up to 1"),
                ([self.dense, *some, "--temperature=-1"], "--temperature -1: a number that is not negative"),
                ([self.dense, *some, "--tokens", "0"], "--tokens 0: a positive integer"),
                ([self.dense, *some, "--seed", "x"], "--seed x: an integer"),
                ([self.dense, "--prompt", "x", "--device", "tpu"], "tpu")):
            with self.subTest(message=message):
                said = self.call(*arguments, expect=2).stderr.decode()
                self.assertIn(message, said)
                self.assertEqual(said.count("upcycle: "), 1, said)
        said = self.call(bare, *some, ranks=2, expect=2).stderr.decode()
        self.assertEqual(said.count("no tokenizer.json there"), 1, said)
        self.assertEqual(self.sample(bare, "--tokenizer", self.dense, "--tokens", 5)["samples"], self.sample(self.dense, "--tokens", 5)["samples"])


if __name__ == "__main__":
    UPCYCLE = Path(sys.argv.pop(1)).resolve()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    unittest.main()
