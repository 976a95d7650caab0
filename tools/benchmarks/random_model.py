"""Writes a random Qwen3-MoE as a Hugging Face directory, in bf16: python random_model.py DIRECTORY DESCRIPTION, JSON with the fields of a
model (see accelerator.py). Matrices N(0, 0.02), norms 1, as Hugging Face initialises them; drawn on the GPU where there is one."""
import json
import sys
from pathlib import Path

import torch
from model_config import config_of
from safetensors.torch import save_file


def main(directory, of):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    hidden, head = of["hidden"], of["head_dim"]
    matrix = lambda *size: (torch.randn(*size, device=device) * 0.02).to(torch.bfloat16).cpu()   # noqa: E731
    ones = lambda width: torch.ones(width, dtype=torch.bfloat16)   # noqa: E731
    directory.mkdir(parents=True)
    shards, index = of["layers"] + 1, {}

    def save(number, tensors):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file(tensors, directory / file, {"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    for layer in range(of["layers"]):
        at = f"model.layers.{layer}."
        tensors = {at + "input_layernorm.weight": ones(hidden), at + "post_attention_layernorm.weight": ones(hidden),
                   at + "self_attn.q_norm.weight": ones(head), at + "self_attn.k_norm.weight": ones(head),
                   at + "self_attn.q_proj.weight": matrix(of["heads"] * head, hidden), at + "self_attn.k_proj.weight": matrix(of["kv_heads"] * head, hidden),
                   at + "self_attn.v_proj.weight": matrix(of["kv_heads"] * head, hidden), at + "self_attn.o_proj.weight": matrix(hidden, of["heads"] * head),
                   at + "mlp.gate.weight": matrix(of["experts"], hidden)}
        for expert in range(of["experts"]):
            tensors |= {f"{at}mlp.experts.{expert}.{name}_proj.weight": matrix(*size)
                        for name, size in (("gate", (of["ffn"], hidden)), ("up", (of["ffn"], hidden)), ("down", (hidden, of["ffn"])))}
        save(layer, tensors)
    save(of["layers"], {"model.embed_tokens.weight": matrix(of["vocab"], hidden), "model.norm.weight": ones(hidden)})
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (directory / "config.json").write_text(json.dumps(config_of(of)))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
