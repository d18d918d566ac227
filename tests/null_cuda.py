"""
A GPU that isn't there: a libcuda, libcudart and libcublas whose kernels do nothing and whose memory is untouched host
memory. All the rest is real: dispatch, device and dtype checks, the caching allocator, Inductor, Triton and ptxas for
the architecture. Values mean nothing. Needs Linux on x86-64, the torch wheel with CUDA, and gcc.
"""

import subprocess
import sysconfig
from pathlib import Path

HERE = Path(__file__).parent
KIB, GIB = 2**10, 2**30
CARDS = {  # name, compute capability, memory (as torch names it on real ones), most shared memory of a block
    "H100": ("NVIDIA H100 80GB HBM3", (9, 0), 84_942_979_072, 227 * KIB),
    "A100": ("NVIDIA A100-SXM4-80GB", (8, 0), 85_094_825_984, 163 * KIB),
    "B200": ("NVIDIA B200", (10, 0), int(178.35 * GIB), 227 * KIB),
    "RTX 4090": ("NVIDIA GeForce RTX 4090", (8, 9), int(23.64 * GIB), 99 * KIB),
    "RTX 3060": ("NVIDIA GeForce RTX 3060", (8, 6), int(11.76 * GIB), 99 * KIB),
}


def build(folder, card="H100"):
    """Compile the libraries of a card into a folder; returns the environment in which a process sees it."""
    name, (major, minor), memory, shared = CARDS[card]

    # the headers are those of the wheels
    site = Path(sysconfig.get_path("purelib"))
    library = folder / "libcuda.so.1"
    command = ["gcc", "-O1", "-w", "-shared", "-fPIC", f"-Wl,-soname,{library.name}", "-o", library]
    command += [f"-I{site}/nvidia/cu13/include", f"-I{site}/triton/backends/nvidia/include"]
    command += [f'-DNAME="{name}"', f"-DMAJOR={major}", f"-DMINOR={minor}", f"-DMEMORY={memory}ull"]
    command += [f"-DSHARED={shared}", "-DCONTEXT=(600ull << 20)", *HERE.glob("null_*.c"), "-ldl"]
    subprocess.run(command, check=True)

    # it comes before the real libcuda, for torch and for Triton
    folders = dict.fromkeys(("LD_LIBRARY_PATH", "TRITON_LIBCUDA_PATH"), str(folder))
    return folders | {"LD_PRELOAD": str(library), "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled")}


def forgive_values():
    """In a process that has this GPU: replace the checks of values, which mean nothing. A step may take long."""
    import numpy as np

    import prepare

    score = prepare.bits_of_rows

    def bits_of_rows(model, rows, *arguments):
        try:
            return score(model, rows, *arguments)
        except ValueError as error:  # the last thing that it does is to look at them
            assert "some are not finite" in str(error)
            return np.ones(len(rows))

    prepare.bits_of_rows = bits_of_rows

    # no comparison of kernels by their values, and no best.pt of 6 GB
    prepare.runtime.choose_attention = lambda *arguments: prepare.runtime.varlen
    prepare.journal.save_best = lambda *arguments: None
    prepare.LATE_LIMIT = 99
