"""Peer: what NCCL itself moves between ranks (Gloo on a CPU), through torch.distributed, one process a GPU, started by mpirun:
collectives_peer.py cpu|cuda BYTES... Rank 0 prints lines of JSON. Sizes, ways of counting and of timing are those of
tools/benchmarks/collectives.cpp, beside which it is shown."""
import json
import os
import statistics
import sys
import time

import torch
import torch.distributed as dist

MOST, LONG_SECONDS, ROUNDS, MEET = 20, 0.05, 5, 3
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Stopwatch:
    def __init__(self, device):
        self.device = device

    def slowest(self, seconds):
        x = torch.tensor([seconds], dtype=torch.float64, device=self.device)
        dist.all_reduce(x, dist.ReduceOp.MAX)
        return x.item()

    def of(self, times, run):
        if self.device.type == "cpu":
            begin = time.perf_counter()
            for _ in range(times):
                run()
            return (time.perf_counter() - begin) / times
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(times):
            run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3 / times

    def seconds(self, x, run):
        x.uniform_(-1, 1)
        run()   # makes connections
        once = self.slowest(self.of(1, run))
        times = max(1, min(MOST, int(LONG_SECONDS / max(once, 1e-9))))
        rounds = []
        for _ in range(3 if times == 1 else ROUNDS):
            x.uniform_(-1, 1)
            dist.barrier()
            if self.device.type == "cuda":
                torch.cuda._sleep(20_000_000)   # some 10 ms, in which the host gets ahead: Python's launches do not count
            for _ in range(0 if times == 1 else MEET):
                run()
            rounds.append(self.slowest(self.of(times, run)))
        return statistics.median(rounds)


def operations(rank, n):
    """(name, dtype, share of a tensor's bytes that a link carries at least, what is done with x)."""
    part, received = (n - 1) / n, {}
    own = lambda x: x.narrow(0, rank * (x.numel() // n), x.numel() // n)   # noqa: E731

    def room(x):
        if received.get("x") is None or received["x"].numel() != x.numel():
            received["x"] = torch.empty_like(x)
        return received["x"]

    def exchange(x):
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, x, (rank + 1) % n), dist.P2POp(dist.irecv, room(x), (rank - 1) % n)]):
            work.wait()

    yield "all-reduce", "fp32", 2 * part, dist.all_reduce
    yield "all-reduce", "bf16", 2 * part, dist.all_reduce
    yield "reduce-scatter", "fp32", part, lambda x: dist.reduce_scatter_tensor(own(x), x)
    yield "reduce-scatter", "bf16", part, lambda x: dist.reduce_scatter_tensor(own(x), x)
    yield "all-gather", "bf16", part, lambda x: dist.all_gather_into_tensor(x, own(x))
    yield "all-to-all", "bf16", part, lambda x: dist.all_to_all_single(room(x), x)
    yield "send + receive", "bf16", 1, exchange


def main(wish, sizes):
    rank, n, local = (int(os.environ[f"OMPI_COMM_WORLD_{name}"]) for name in ("RANK", "SIZE", "LOCAL_RANK"))
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(n), "LOCAL_RANK": str(local)}   # MASTER_ADDR and MASTER_PORT are the caller's
    device = torch.device(wish, local % torch.cuda.device_count()) if wish == "cuda" else torch.device("cpu")
    if wish == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if wish == "cuda" else "gloo", init_method="env://", device_id=device if wish == "cuda" else None)
    by = f"NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if wish == "cuda" else "Gloo"
    stopwatch = Stopwatch(device)
    for operation, dtype, carried, run in operations(rank, n):
        for size in sizes:
            count = max(1, size // DTYPES[dtype].itemsize // n) * n
            x = torch.empty(count, dtype=DTYPES[dtype], device=device)
            line = {"operation": operation, "dtype": dtype, "bytes": count * x.element_size(), "by": by}
            try:
                seconds = stopwatch.seconds(x, lambda: run(x))
                line |= {"seconds": seconds, "bus_bytes_per_second": carried * line["bytes"] / seconds}
            except (RuntimeError, NotImplementedError) as why:   # what Gloo has not, on all ranks alike
                line |= {"failed": str(why).splitlines()[0]}
            if rank == 0:
                print(json.dumps(line), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], [int(word) for word in sys.argv[2:]])
