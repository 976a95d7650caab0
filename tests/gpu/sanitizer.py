#!/usr/bin/env python3
"""compute-sanitizer's memcheck over a GPU test's binary: reads and writes beyond what was allocated. What measures speed is left out. Exits 77
without a GPU.
Usage: sanitizer.py COMPUTE_SANITIZER BINARY"""
import os
import sys

from gpu_here import skip_without_gpu

if __name__ == "__main__":
    sanitizer, binary = sys.argv[1:]
    skip_without_gpu()
    # LibTorch's allocator cuts tensors out of large blocks, in which memcheck sees no borders between them.
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    os.execv(sanitizer, [sanitizer, "--tool", "memcheck", "--error-exitcode", "1", binary, "--gtest_filter=-*Rates*:*Speed*"])
