#!/usr/bin/env python3
"""Holds src/ to the house's rules: which folder may include which, and where heavy or foreign headers may appear."""
import pathlib
import re
import sys

MAY_INCLUDE = {
    "base": "", "config": "base", "device": "base", "parallel": "base device config", "ops": "base device",
    "checkpoint": "base device parallel", "data": "base config device", "moe": "base config device parallel ops",
    "model": "base config parallel ops moe", "upcycle": "base config model parallel/grid.hpp",
    "train": "base config device parallel ops checkpoint data moe model upcycle",
    "cli": "base config device parallel checkpoint data moe model upcycle train", "": "base config parallel cli",
}
FORBIDDEN = [  # (what, in which files, except there, why)
    (r"#include [<\"](torch/torch|ATen/ATen)\.h", r"", r"^$", "includes all of LibTorch: narrow includes compile in a third of the time"),
    (r"#include [<\"](spdlog|fmt)/", r"", r"^base/log\.cpp$", "only base/log.cpp: LibTorch's folder has another fmt"),
    (r"#include [<\"](mpi|hdf5|nccl)\.h", r"\.hpp$", r"^$", "MPI, HDF5 and NCCL stay in .cpp files"),
    (r"#include [<\"](torch|ATen|c10)/", r"\.cuh?$", r"^$", "kernels see plain pointers: nvcc and LibTorch's headers are slow together"),
    (r"\bUPCYCLE_CUDA\b", r"", r"^(device/\w+|parallel/nccl)\.cpp$", "both builds share the objects of all other files"),
]


def problems(root):
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".hpp", ".cpp", ".cu", ".cuh")):
        name = path.relative_to(root).as_posix()
        folder = name.split("/")[0] if "/" in name else ""
        allowed = MAY_INCLUDE[folder].split() + [folder]
        for number, line in enumerate(path.read_text().splitlines(), 1):
            include = re.match(r'\s*#\s*include "(([^"/]*)/[^"]*)"', line)
            if include and include[1] not in allowed and include[2] not in allowed:
                yield f"src/{name}:{number}: {folder or 'main'} may not include {include[1]}"
            for what, where, exception, why in FORBIDDEN:
                if re.search(what, line) and re.search(where, name) and not re.search(exception, name):
                    yield f"src/{name}:{number}: {line.strip()}: {why}"


found = list(problems(pathlib.Path(__file__).parent.parent / "src"))
print("\n".join(found) or "src/ keeps to its layers")
sys.exit(bool(found))
