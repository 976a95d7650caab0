"""What this GPU can do, measured by torch: python ceilings.py DESCRIPTION, JSON with the fields of a model (see accelerator.py), `tokens` of a step
and `device`. Prints a line of JSON: bytes/s of a copy (read and written), FLOP/s of an 8192^3 matrix product in bf16, and seconds and FLOP/s
of the model's own products, forward, input gradient and weight gradient; experts' as if their rows were equal in number. Random data; medians."""
import json
import statistics
import sys
import time

import torch

REPEATS, WARM_UP = 15, 4


def seconds_of(function, device):
    if device != "cuda":
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            function()
            times.append(time.perf_counter() - begin)
        return statistics.median(times)
    for _ in range(WARM_UP):
        function()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPEATS + 1)]
    events[0].record()
    for event in events[1:]:
        function()
        event.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(events, events[1:])) / 1e3


def product(rows, inputs, outputs, device):
    """Seconds of y = x W^T, dx = dy W, dW = dy^T x."""
    draw = lambda *size: torch.randn(*size, device=device, dtype=torch.bfloat16)   # noqa: E731
    x, weight, dy = draw(rows, inputs), draw(outputs, inputs), draw(rows, outputs)
    return {"forward": seconds_of(lambda: x @ weight.t(), device), "input_gradient": seconds_of(lambda: dy @ weight, device),
            "weight_gradient": seconds_of(lambda: dy.t() @ x, device)}


def main(of):
    device, tokens = of["device"], of["tokens"]
    on_gpu = device == "cuda"
    a = torch.empty(2**31 if on_gpu else 2**24, dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    copy = 2 * a.numel() / seconds_of(lambda: b.copy_(a), device)
    del a, b
    side = 8192 if on_gpu else 256
    square = seconds_of(lambda x=torch.randn(side, side, device=device, dtype=torch.bfloat16), y=torch.randn(side, side, device=device, dtype=torch.bfloat16): x @ y, device)
    q, kv, per_expert = of["heads"] * of["head_dim"], of["kv_heads"] * of["head_dim"], max(1, tokens * of["top_k"] // of["experts"])
    products, total = [], 0.0
    for name, rows, inputs, outputs, times in (
            ("q, k, v", tokens, of["hidden"], q + 2 * kv, of["layers"]), ("attention out", tokens, q, of["hidden"], of["layers"]),
            ("gate and up of an expert", per_expert, of["hidden"], 2 * of["ffn"], of["layers"] * of["experts"]),
            ("down of an expert", per_expert, of["ffn"], of["hidden"], of["layers"] * of["experts"]),
            ("head", tokens, of["hidden"], of["vocab"], 1)):
        seconds = product(rows, inputs, outputs, device)
        flops = 2 * rows * inputs * outputs
        products.append({"product": name, "rows": rows, "inputs": inputs, "outputs": outputs, "times": times, "seconds": seconds,
                         "flops_per_second": {way: flops / took for way, took in seconds.items()}})
        total += times * sum(seconds.values())
    print(json.dumps({"copy_bytes_per_second": copy, "gemm_side": side, "gemm_flops_per_second": 2 * side**3 / square, "products": products,
                      "products_seconds": total}), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
