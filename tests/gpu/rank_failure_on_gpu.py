#!/usr/bin/env python3
"""The failures of tests/e2e/rank_failure.py over NCCL, on two ranks that share one GPU: a rank that is killed, stopped or throws ends the
other, whose GPU may be waiting in a kernel of NCCL. Exits 77 without a GPU.
Usage: rank_failure_on_gpu.py UPCYCLE FAIL_ALLOCATIONS.so"""
import os
import sys
import unittest
from pathlib import Path

from gpu_here import skip_without_gpu

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "e2e"))
import rank_failure   # noqa: E402
import tiny_run       # noqa: E402


class OnOneGpu(rank_failure.RankFailure):
    RANKS = 2
    SETTINGS = ["run.device=cuda", "run.share_gpu=true", "run.transport=nccl"]

    def of_rank(self, rank):
        # NCCL refuses two ranks of one host on one GPU; so each gets a host of its own, and they meet on the loopback device.
        return ["-x", f"NCCL_HOSTID=rank{rank}", "-x", "NCCL_SOCKET_IFNAME=lo", "-x", "NCCL_IB_DISABLE=1", "-x", "NCCL_NVLS_ENABLE=0"]

    def test_all(self):
        self.all_failures()


if __name__ == "__main__":
    skip_without_gpu()
    tiny_run.UPCYCLE = os.path.abspath(sys.argv.pop(1))
    rank_failure.FAIL_ALLOCATIONS = os.path.abspath(sys.argv.pop(1))
    rank_failure.TIMEOUT = 20   # the first step on a GPU takes seconds
    os.environ |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    unittest.main()
