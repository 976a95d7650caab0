#!/usr/bin/env python3
"""Makes the reference values of the golden tests: tiny seeded Qwen3 and Qwen3-MoE models as Hugging Face transformers computes them.

make_golden.py DIR writes for every case DIR/<case>/model, a Hugging Face directory, and DIR/<case>/golden.safetensors:
  ids        [batches, B, S+1]  token ids; inputs are ids[:, :, :-1], labels ids[:, :, 1:]
  logits     [B*S, V]           fp32, of batch 0
  loss.mean  []                 mean cross entropy of batch 0
  gradient.* as our catalogue names and stacks parameters: d loss.mean
  losses     [steps]            before each AdamW step; step t on batch t % batches
  gap        []                 smallest distance between the last chosen and the first rejected router logit, over all of this
"""
import json
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from transformers.utils import logging

BATCHES, SEQUENCES, LENGTH, STEPS = 5, 2, 24, 20
SMALLEST_GAP = 1e-4  # of router logits: below it, rounding may choose another expert
# eps: at 1e-8 a gradient that is zero but for rounding moves a weight by the whole learning rate, either way.
ADAMW = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-6)
WEIGHT_DECAY, CLIP = 0.1, 1.0


@dataclass
class Case:
    name: str
    config: dict
    dtype: torch.dtype = torch.float32  # of the files
    shards: str = "1GB"
    form: str = "hub"  # of config.json: hub or v5
    moe: dict = field(default_factory=dict)


SHAPE = dict(vocab_size=157, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=128, rms_norm_eps=1e-6,
             max_position_embeddings=64, rope_theta=1e6, use_sliding_window=False, attention_bias=False)


def shape(heads, kv_heads, tied, **others):
    return {**SHAPE, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied, **others}


def experts(count, top_k, width, renormalise, **others):
    return dict(num_experts=count, num_experts_per_tok=top_k, moe_intermediate_size=width, norm_topk_prob=renormalise, **others)


# Top-1 with renormalised weights is left out: its router has no gradient, and rounding noise can not be compared.
CASES = [
    Case("dense_gqa1_fp32", shape(4, 4, False)),
    Case("dense_gqa2_tied_bf16_sharded", shape(4, 2, True), torch.bfloat16, "60KB", "v5"),
    Case("dense_gqa8_fp16", shape(8, 1, False, head_dim=16), torch.float16),
    Case("dense_gqa2_tied_fp32", shape(4, 2, True, rms_norm_eps=1e-5), form="v5"),
    Case("moe_renormalised_fp32", shape(4, 2, False), moe=experts(8, 2, 48, True)),
    Case("moe_plain_bf16_sharded", shape(8, 1, True), torch.bfloat16, "100KB", "v5", experts(6, 3, 40, False)),
    Case("moe_mixed_sparse_step_fp16", shape(4, 4, False, num_hidden_layers=4), torch.float16,
         moe=experts(8, 2, 32, True, decoder_sparse_step=2, mlp_only_layers=[1])),
    Case("moe_mixed_dense_first", shape(4, 2, True, num_hidden_layers=3), form="v5",
         moe=experts(4, 1, 64, False, mlp_only_layers=[0])),
]


def build(case, seed):
    """Weights with a spread at which everything matters: matrices keep the size of what they multiply, norms are not 1."""
    # v5 keeps RoPE's settings in a group of their own.
    settings = {k: v for k, v in case.config.items() if k != "rope_theta"}
    settings["rope_parameters"] = {"rope_type": "default", "rope_theta": case.config["rope_theta"]}
    settings |= case.moe | dict(dtype=case.dtype, attn_implementation="eager", experts_implementation="eager")
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings)) if case.moe else Qwen3ForCausalLM(Qwen3Config(**settings))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            draw = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                p.copy_(1 + 0.2 * draw)
            elif "embed_tokens" in name:
                p.copy_(draw if not case.config["tie_word_embeddings"] else 0.3 * draw)
            else:
                spread = 2.0 if name.endswith("mlp.gate.weight") else 1.0
                p.copy_(spread * draw / p.shape[-1] ** 0.5)
    return model.to(case.dtype)


def in_hub_form(case, config):
    """config.json as the published models have it, which transformers 4 reads."""
    config = {k: v for k, v in config.items() if k not in ("rope_parameters", "num_local_experts", "dtype", "layer_types")}
    config |= {"rope_theta": case.config["rope_theta"], "rope_scaling": None, "torch_dtype": str(case.dtype).split(".")[1]}
    if case.moe:
        config["num_experts"] = case.moe["num_experts"]
    return config


def store(case, model, directory):
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory, max_shard_size=case.shards)
    assert (directory / "model.safetensors.index.json").exists() == (case.shards != "1GB"), "sharded, or not, as asked"
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config.pop("experts_implementation", None)
    if case.form == "hub":
        config = in_hub_form(case, config)
    else:
        assert "rope_parameters" in config and "rope_theta" not in config
        assert not case.moe or "num_local_experts" in config
    path.write_text(json.dumps(config, indent=2))


def load(directory):
    model, report = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager",
                                                         experts_implementation="eager", output_loading_info=True)
    assert not any(report[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model


class Gap:
    """The smallest gap that any router of the model ever saw."""

    def __init__(self, model):
        self.smallest = float("inf")
        for module in model.modules():
            if isinstance(module, Qwen3MoeTopKRouter):
                module.register_forward_hook(self.see)

    def see(self, router, _, output):
        best = output[0].detach().topk(router.top_k + 1, dim=-1).values
        self.smallest = min(self.smallest, (best[:, -2] - best[:, -1]).min().item())


def loss_of(model, ids):
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    return logits, torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


def gradients(model):
    """By the names of our catalogue: experts stacked, gate and up apart."""
    out = {}
    for name, p in model.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            out[name.replace("gate_up_proj", "gate_proj.weight")], out[name.replace("gate_up_proj", "up_proj.weight")] = p.grad.chunk(2, 1)
        elif name.endswith("experts.down_proj"):
            out[name + ".weight"] = p.grad
        else:
            out[name] = p.grad
    return {f"gradient.{name}": g.detach().clone().contiguous() for name, g in out.items()}


def train(model, ids):
    decaying = [p for n, p in model.named_parameters() if "norm" not in n]
    others = [p for n, p in model.named_parameters() if "norm" in n]
    optimizer = torch.optim.AdamW([{"params": decaying, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}], **ADAMW)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        _, loss = loss_of(model, ids[step % BATCHES])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


def make(case, folder, seed):
    store(case, build(case, seed), folder / "model")
    model = load(folder / "model")
    gap = Gap(model)
    ids = torch.randint(case.config["vocab_size"], (BATCHES, SEQUENCES, LENGTH + 1), generator=torch.Generator().manual_seed(seed + 1))
    logits, loss = loss_of(model, ids[0])
    loss.backward()
    golden = {"ids": ids, "logits": logits.detach().flatten(0, 1).contiguous(), "loss.mean": loss.detach(), **gradients(model)}
    golden["losses"] = train(model, ids)
    golden["gap"] = torch.tensor(gap.smallest, dtype=torch.float64)
    save_file(golden, folder / "golden.safetensors")
    return gap.smallest, golden["losses"]


def main(target):
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    for number, case in enumerate(CASES):
        for seed in range(1000 * number, 1000 * number + 20):
            gap, losses = make(case, target / case.name, seed)
            if gap > SMALLEST_GAP:
                break
        assert gap > SMALLEST_GAP, f"{case.name}: no seed keeps the routers' choices apart"
        print(f"{case.name}: seed {seed}, smallest gap {gap:.1e}, loss {losses[0]:.4f} -> {losses[-1]:.4f}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
