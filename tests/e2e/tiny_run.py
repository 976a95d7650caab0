"""What the tests of `upcycle train` share: a tiny dense Qwen3 on disk, token files, and a case that drives the executable."""
import json
import os
import struct
import subprocess
import tempfile
import time
import unittest
from pathlib import Path

import numpy as np
from rank_server import served
from safetensors.numpy import save_file

os.environ.pop("SLURM_NTASKS", None)   # where tests run inside of a Slurm job, each takes a part of it
UPCYCLE = None   # set by the script that is run
MPIRUN = os.environ.get("UPCYCLE_MPIRUN", "mpirun --oversubscribe --bind-to none --mca mpi_yield_when_idle 1").split()
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD, FFN, VOCAB, SEQUENCE = 32, 2, 4, 2, 16, 48, 96, 16
CONFIG = dict(architectures=["Qwen3ForCausalLM"], model_type="qwen3", vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=LAYERS,
              num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, head_dim=HEAD, intermediate_size=FFN,
              max_position_embeddings=128, rope_theta=1e6, rms_norm_eps=1e-6, hidden_act="silu", attention_bias=False,
              tie_word_embeddings=True, torch_dtype="float32")
MOE = "[moe]\nexperts = 8\ntop_k = 4\ngranularity = 4\n"


def dense_tensors():
    random = np.random.default_rng(3)
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes |= {at + "input_layernorm.weight": (HIDDEN,), at + "post_attention_layernorm.weight": (HIDDEN,),
                   at + "self_attn.q_proj.weight": (HEADS * HEAD, HIDDEN), at + "self_attn.k_proj.weight": (KV_HEADS * HEAD, HIDDEN),
                   at + "self_attn.v_proj.weight": (KV_HEADS * HEAD, HIDDEN), at + "self_attn.o_proj.weight": (HIDDEN, HEADS * HEAD),
                   at + "self_attn.q_norm.weight": (HEAD,), at + "self_attn.k_norm.weight": (HEAD,),
                   at + "mlp.gate_proj.weight": (FFN, HIDDEN), at + "mlp.up_proj.weight": (FFN, HIDDEN),
                   at + "mlp.down_proj.weight": (HIDDEN, FFN)}
    return {name: (1 + 0.1 * random.standard_normal(shape) if "norm" in name else 0.15 * random.standard_normal(shape)).astype(np.float32)
            for name, shape in shapes.items()}


def make_dense(directory, tensors=None, **config):
    """A Hugging Face directory in one file."""
    directory.mkdir(exist_ok=True)
    save_file(tensors or dense_tensors(), directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(CONFIG | config))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    return directory


def write_tokens(prefix, documents, magic=b"MMIDIDX\0\0", version=1, code=4, dtype=np.int32):
    """Megatron's .bin/.idx of int32 tokens, or of what `code` and `dtype` say."""
    lengths = np.array([len(document) for document in documents], np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]).astype(np.int64) * np.dtype(dtype).itemsize
    Path(f"{prefix}.bin").write_bytes(np.concatenate(documents).astype(dtype).tobytes())
    Path(f"{prefix}.idx").write_bytes(magic + struct.pack("<QBQQ", version, code, len(documents), len(documents) + 1) + lengths.tobytes() +
                                      offsets.tobytes() + np.arange(len(documents) + 1, dtype=np.int64).tobytes())


def write_mask(prefix, masks):
    """The loss mask beside the tokens: a byte for each."""
    write_tokens(f"{prefix}.mask", masks, code=1, dtype=np.uint8)


def steps_of(run):
    """The lines of metrics.jsonl that are training steps."""
    path = run / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []   # without the one that is being written
    return [line for line in map(json.loads, lines) if line["kind"] == "step"]


def checkpoint(run, step):
    return run / f"checkpoints/step-{step:08d}"


class TrainCase(unittest.TestCase):
    def setUp(self):
        scratch = tempfile.TemporaryDirectory()
        self.addCleanup(scratch.cleanup)
        self.root = Path(scratch.name)
        self.source = make_dense(self.root / "source")

    def run_file(self, directory, extra="", source=True, steps=6, precision="fp32", data='train = "mock"', **train):
        """A run file and its run directory. `extra`: further sections; `train`: further keys of [train]."""
        source = f'model = "{self.source}"' if source is True else source
        train = {"steps": steps, "sequence": SEQUENCE, "global_batch": 8, "precision": f'"{precision}"'} | train
        head, extra = extra.split("\n", 1) if extra.startswith("signal") else ("", extra)
        path = self.root / f"{directory}.toml"
        path.write_text(f'[run]\nname = "{directory}"\ndirectory = "{self.root / directory}"\ndevice = "cpu"\n{head}\n[source]\n{source}\n'
                        f'[data]\n{data}\n[train]\n' + "".join(f"{key} = {value}\n" for key, value in train.items()) + extra)
        return path, self.root / directory

    def command(self, *arguments, ranks=1, program=None):
        launcher = [*MPIRUN, "-np", str(ranks)] if ranks > 1 else []
        return [*launcher, program or UPCYCLE, *map(str, arguments)]

    def upcycle(self, *arguments, ranks=1, expect=0, through=()):
        """What the program says. `through`: a program that starts it."""
        program = UPCYCLE if through else served(UPCYCLE)
        result = subprocess.run([*through, *self.command(*arguments, ranks=ranks, program=program)], capture_output=True, text=True, timeout=120, cwd=self.root)
        self.assertEqual(result.returncode, expect, result.stdout + result.stderr)
        return result.stdout + result.stderr

    def start(self, *arguments, run, ranks=1, after=8):
        """A job in the background, once it has done `after` steps."""
        before = len(steps_of(run))
        job = subprocess.Popen(self.command(*arguments, ranks=ranks), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.root)
        self.addCleanup(lambda: (job.poll() is None and job.kill(), job.wait(), job.stdout.close()))
        deadline = time.monotonic() + 60
        while len(steps_of(run)) < before + after:
            self.assertTrue(job.poll() is None and time.monotonic() < deadline, job.stdout.read() if job.poll() is not None else "no steps")
            time.sleep(0.02)
        return job

    def finish(self, job, expect):
        said = job.communicate(timeout=100)[0]
        self.assertEqual(job.returncode, expect, said)
        return said

    @staticmethod
    def ranks_of(job):
        """The process ids of a job's ranks: mpirun's children."""
        return [int(pid) for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()]

    def tree(self):
        return {path: path.read_bytes() for path in self.root.rglob("*") if path.is_file()}

    def refused(self, *arguments, words, ranks=1):
        """Exit code 2, one message with all of `words`, nothing written, nothing lost."""
        before = self.tree()
        said = self.upcycle(*arguments, ranks=ranks, expect=2)
        for word in words:
            self.assertIn(word, said)
        self.assertEqual(said.count("upcycle: "), 1, said)
        after = self.tree()
        self.assertEqual(sorted(after), sorted(before), "something was written or lost")
        self.assertEqual(after, before, "something was changed")
        return said

    def assert_same_files(self, a, b, names=("weights.h5", "masters.h5", "exp_avg.h5", "exp_avg_sq.h5")):
        """The tensor files of two checkpoints, byte for byte."""
        present = [name for name in names if (a / name).exists()]
        self.assertEqual(present, [name for name in names if (b / name).exists()])
        self.assertIn("weights.h5", present)
        for name in present:
            self.assertEqual((a / name).read_bytes(), (b / name).read_bytes(), name)
        return present
