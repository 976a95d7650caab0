"""What the peers of `tools/bench step` share. A peer is a process of its own: python PEER.py DESCRIPTION, where DESCRIPTION is JSON (see
`Step`); it prints one line of JSON. Nothing is logged while it runs, and the host never waits for the GPU between two steps."""
import importlib.metadata
import json
import sys
import time
import traceback
from dataclasses import dataclass, field, fields
from typing import Any, Callable

import numpy
import torch


@dataclass
class Step:
    """A training step of a Qwen3-MoE whose layers all have experts."""
    hidden: int
    ffn: int             # width of one expert
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    experts: int
    top_k: int
    sequence: int
    micro_batch: int     # sequences; the whole step
    tokens: str          # .npy, int32 [sequences, sequence + 1]: a step takes the next micro_batch of them, again and again
    warm_up: int
    steps: int           # that are measured
    device: str = "cuda"
    backend: str = "inductor"   # of torch.compile
    clip: bool = False
    way: str = ""        # a peer's own choice
    lr: float = 1e-5


@dataclass
class Peer:
    parameters: list
    forward_backward: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]   # (inputs, labels) [micro_batch, sequence] -> loss
    update: Callable[[], Any]                                                # optimizer, and gradients gone
    notes: dict = field(default_factory=dict)
    clip: Callable[[], Any] | None = None    # of its own; else torch.nn.utils.clip_grad_norm_


class Clock:
    """A moment in the device's work."""
    def __init__(self, device):
        self.event = torch.cuda.Event(enable_timing=True) if device == "cuda" else None
        self.event.record() if self.event else setattr(self, "time", time.perf_counter())

    def seconds_until(self, later):
        return self.event.elapsed_time(later.event) / 1e3 if self.event else later.time - self.time


def fused_adamw(parameters, step):
    """torch.optim.AdamW as the peers use it: moments in the parameters' dtype."""
    optimizer = torch.optim.AdamW(parameters, lr=step.lr, fused=True)

    def update():
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return update


def own(tensor):
    """This rank's part of a DTensor, which on one GPU is all of it."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def measure(step, build):
    torch.manual_seed(0)
    began = time.monotonic()
    peer = build(step)
    tokens = torch.from_numpy(numpy.load(step.tokens)).long()
    on_gpu = step.device == "cuda"
    clip = peer.clip or (lambda: torch.nn.utils.clip_grad_norm_(peer.parameters, 1.0, foreach=True))
    losses, clocks, gradient_norm = [], [], None
    for number in range(step.warm_up + step.steps):
        if number == step.warm_up:
            if on_gpu:
                torch.cuda.synchronize()
            warm = time.monotonic()
            clocks.append(Clock(step.device))
        rows = torch.arange(number * step.micro_batch, (number + 1) * step.micro_batch) % len(tokens)
        batch = tokens[rows]
        if on_gpu:
            batch = batch.pin_memory().to("cuda", non_blocking=True)
        loss = peer.forward_backward(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())
        if number == 0:   # a step whose gradients vanish is no step
            gradient_norm = torch.stack([own(p.grad).float().norm() for p in peer.parameters if p.grad is not None]).norm().item()
        if step.clip:
            clip()
        peer.update()
        losses.append(loss.detach())
        if number >= step.warm_up:
            clocks.append(Clock(step.device))
    if on_gpu:
        torch.cuda.synchronize()
    return {"seconds": [a.seconds_until(b) for a, b in zip(clocks, clocks[1:])], "losses": [loss.item() for loss in losses],
            "gradient_norm": gradient_norm, "parameters": sum(p.numel() for p in peer.parameters),
            "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0, "reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else 0,
            "warm_up_seconds": warm - began, "states": str(peer.parameters[0].dtype).removeprefix("torch."), "torch": torch.__version__,
            **peer.notes}


def version_of(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def main(build):
    """What could not be measured is a result, too: {"failed": why}."""
    known = {each.name for each in fields(Step)}
    step = Step(**{key: value for key, value in json.loads(sys.argv[1]).items() if key in known})
    try:
        told = measure(step, build)
    except torch.OutOfMemoryError:
        told = {"failed": "out of memory"}
    except ImportError as error:
        told = {"failed": f"not installed here: {error}"}
    except Exception as error:
        traceback.print_exc()
        what = str(error).strip()
        told = {"failed": "out of memory" if "out of memory" in what else f"{type(error).__name__}: {(what.splitlines() or [''])[-1]}"}
    print(json.dumps(told), flush=True)
