"""Training steps of a Qwen3 or Qwen3-MoE as Hugging Face transformers and torch.optim do them, one way after another, each in a process of its own.
Usage: transformers_step.py MODEL_DIR TOKENS.npy STEPS PRECISION/EXPERTS... Prints a line of JSON a step: way, seconds, loss; where a way does
not run: way, failed.

PRECISION: fp32; bf16 (weights, gradients and moments in bf16); autocast (fp32 weights and moments, products in bf16).
EXPERTS: transformers' implementation of a mixture's experts, or nothing. TOKENS: [sequences, length + 1], the same batch every step."""
import contextlib
import json
import os
import sys
import time

import numpy
import torch
from transformers import AutoModelForCausalLM


def train(directory, tokens, steps, way):
    precision, _, experts = way.partition("/")
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, attn_implementation="sdpa",
                                                 **({"experts_implementation": experts} if experts else {}))
    model.config.use_cache = False
    model.train()
    decayed = [value for name, value in model.named_parameters() if "norm" not in name]
    others = [value for name, value in model.named_parameters() if "norm" in name]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], lr=1e-4,
                                  betas=(0.9, 0.95), eps=1e-8, fused=True)
    batch = torch.from_numpy(numpy.load(tokens)).long()
    inputs, targets = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
    for _ in range(int(steps)):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else contextlib.nullcontext():
            logits = model(input_ids=inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        print(json.dumps({"way": way, "loss": loss.item(), "seconds": time.perf_counter() - start}), flush=True)


def main(directory, tokens, steps, *ways):
    """Each way in a fork of this process, which has done no more than load torch: that takes longer than the steps of a small model."""
    for way in ways:
        child = os.fork()
        if child == 0:
            try:
                train(directory, tokens, steps, way)
                os._exit(0)
            except Exception as why:
                print(json.dumps({"way": way, "failed": f"{type(why).__name__}: {why}"}), flush=True)
                os._exit(1)
        if os.WIFSIGNALED(status := os.waitpid(child, 0)[1]):
            print(json.dumps({"way": way, "failed": f"ended by signal {os.WTERMSIG(status)}"}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
