# A recipe for Spack 1.0 and newer (https://spack.readthedocs.io). It builds the clone that it lies in:
#
#   spack repo create ~/spack-upcycle upcycle                           # once; says how to add it: spack repo add ...
#   mkdir ~/spack-upcycle/spack_repo/upcycle/packages/upcycle
#   cp packaging/spack/package.py ~/spack-upcycle/spack_repo/upcycle/packages/upcycle/
#   spack env create --dir ~/upcycle-env && spack env activate --dir ~/upcycle-env
#   spack add 'upcycle@0.1.0 +cuda cuda_arch=90a'
#   spack develop --path "$PWD" upcycle@=0.1.0
#   spack concretize && spack install && spack test run upcycle
import os
import re

from spack_repo.builtin.build_systems.cmake import CMakePackage
from spack_repo.builtin.build_systems.cuda import CudaPackage

from spack.package import *


class Upcycle(CMakePackage, CudaPackage):
    """Turns a dense Qwen3 checkpoint into a Mixture-of-Experts model and trains it: one MPI program on LibTorch and parallel HDF5."""

    # There is no release to download yet: `spack develop` names the clone.
    version("0.1.0")

    generator("ninja")
    variant("tools", default=True, description="What the Python scripts need: tokenizers, plots")

    depends_on("c", type="build")
    depends_on("cxx", type="build")
    depends_on("cmake@3.25:", type="build")
    depends_on("cmake@4.0:", type="build", when="+cuda")
    depends_on("git", type="build")
    depends_on("python@3.10:", type=("build", "run"))

    depends_on("openmpi@4.1:")
    depends_on("hdf5@1.10: +mpi")
    depends_on("tomlplusplus")
    depends_on("spdlog")
    depends_on("boost +program_options")
    depends_on("nlohmann-json@3.11:")
    depends_on("xxhash")
    # Only its LibTorch is used; Spack has no other.
    depends_on("py-torch@2.11:")
    depends_on("py-torch ~cuda", when="~cuda")

    with when("+cuda"):
        depends_on("cuda@13:")
        depends_on("nccl")
        depends_on("cutlass@4:", type="build")   # its headers
        depends_on("py-torch +cuda +distributed +nccl")   # with NCCL, so that both load one and the same
        for arch in CudaPackage.cuda_arch_values:
            depends_on(f"py-torch cuda_arch={arch}", when=f"cuda_arch={arch}")
            depends_on(f"nccl cuda_arch={arch}", when=f"cuda_arch={arch}")

    with when("+tools"), default_args(type="run"):
        depends_on("py-numpy")
        depends_on("py-tokenizers")
        depends_on("py-transformers")
        depends_on("py-safetensors")
        depends_on("py-h5py +mpi")
        depends_on("py-matplotlib")
        depends_on("py-pyarrow")
        depends_on("py-jinja2")
        depends_on("py-tqdm")

    conflicts("cuda_arch=none", when="+cuda", msg="name the GPUs to build for: cuda_arch=90a for H100 and H200")
    conflicts("%gcc@:11", msg="C++20 as GCC 12 has it is needed")

    def cmake_args(self):
        # .../torch/share/cmake is what py-torch tells CMake; the library itself is looked for, see cmake/Torch.cmake.
        torch = os.path.dirname(os.path.dirname(self.spec["py-torch"].package.cmake_prefix_paths[0]))
        args = [
            self.define_from_variant("UPCYCLE_CUDA", "cuda"),
            self.define("BUILD_TESTING", False),
            self.define("UPCYCLE_PYTHON", self.spec["python"].command.path),
            self.define("TORCH_CPU_LIBRARY", join_path(torch, "lib", "libtorch_cpu.so")),
        ]
        if self.spec.satisfies("+cuda"):
            # 90a -> 9.0a, 120 -> 12.0: as torch writes them.
            archs = [re.sub(r"^(\d+)(\d)", r"\1.\2", arch) for arch in self.spec.variants["cuda_arch"].value]
            args.append(self.define("UPCYCLE_CUDA_ARCH", archs))
            args.append(self.define("UPCYCLE_NVCC", self.spec["cuda"].prefix.bin.nvcc))
        return args

    def test_version(self):
        """the program starts and names its libraries"""
        program = which(self.prefix.bin.upcycle)
        assert "LibTorch" in program("--version", output=str.split, error=str.split)

    def test_plan(self):
        """plans the 14B example, which needs neither weights nor a GPU"""
        program = which(self.prefix.bin.upcycle)
        with working_dir(self.prefix.share.upcycle):
            assert "89.65 B" in program("plan", "configs/qwen3-14b-64e.toml", output=str.split, error=str.split)
