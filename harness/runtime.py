"""How train.py computes on this machine: device, precision, attention, compiler; and the summary of a run."""

import functools
import gc
import logging
import math
import os
import re
import shutil
import sys
import sysconfig
import tempfile
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn

from harness.common import COMPILER, first_line
from harness.machine import (
    FLASH3_CAPABILITIES,
    PEAK_FLOPS,
    device_name,
    keep_freed_memory,
    load_flash3,
    peak_memory_mb,
    repair_compiler,
    synchronize,
    why_no_gpu,
)

# What drivers and allocators say when memory runs out
OUT_OF_MEMORY = re.compile("(of|enough|allocate) memory|ALLOC_FAILED|MemoryError")

FLASH_ERROR = 0.02  # of the norm of attention or of a gradient: rounding in bfloat16 stays below


class Setup(NamedTuple):
    device: torch.device
    dtype: torch.dtype  # of activations
    attention: Callable  # (q [B, T, H, K], k, v [B, T, G, K], window) -> [B, T, H, K], where G divides H
    compiled: bool = False


def choose_device():
    """CUDA, else MPS, else the CPU. Says why a GPU that is here is not used."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    if reason := why_no_gpu():
        print(f"CPU: {reason}")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def set_up(device, attention, head_dim, query_group, compiled):
    """
    The fastest Setup that is right on this device. Prints a line for each fallback.

    `attention` is the function in plain torch that faster ones have to agree with, for heads of `head_dim` channels of
    which `query_group` share their keys and values. `compiled`: whether torch.compile is wanted.
    """
    sys.stdout.reconfigure(line_buffering=True)
    torch.set_float32_matmul_precision("high")
    keep_freed_memory()
    if device.type != "cuda":
        # torch warns of a CUDA_HOME that a CPU does not need
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    compiled = compiled and device.type != "mps"
    if compiled and (reason := why_not_compiled(device)):
        print(f"COMPILE: torch.compile does not work, going on without ({reason})")
        compiled = False
    dtype = torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    setup = Setup(device, dtype, attention, compiled)
    return setup._replace(attention=choose_attention(setup, head_dim, query_group))


@functools.cache  # of two answers on a busy CPU one would be wrong
def has_fast_bfloat16(device):
    """Whether products of matrices are clearly faster in bfloat16 than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)

    # Products of matrices, timed; in one thread, because two wait for each other when the machine is busy
    size = 256 if device.type == "cpu" else 2048
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.ones(size, size, device=device, dtype=dtype)
        times = timeit.repeat(lambda a=a: (a @ a, synchronize(device)), number=1, repeat=50)
        seconds[dtype] = min(times)
    torch.set_num_threads(threads)
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


# --------------------------------------
# Compiler


def why_not_compiled(device):
    """Why torch.compile does not work on this device; None if it does."""
    missing = missing_tool()
    if missing and device.type == "cpu":  # torch would say so in a hundred lines
        return missing
    try:
        repair_compiler()
        x = torch.ones(2**15, device=device, requires_grad=True)
        torch.compile(lambda x: F.rms_norm(x, x.shape).sum())(x).backward()
    except Exception as error:  # no Triton, say
        return missing or first_line(error)


def missing_tool():
    """A tool that the compiler of torch needs and does not find here, with the fix; None if all seem to be there."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    compiler = os.environ.get("CXX", COMPILER)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not shutil.which(compiler):
        return f"no C++ compiler {compiler}: install one, or set CXX"
    if not header.exists():
        return f"no {header}: install the headers of this Python, as in python3-dev"
    for variable, folder in (("TORCHINDUCTOR_CACHE_DIR", cache_dir()), ("TMPDIR", tempfile.gettempdir())):
        if " " in folder:
            return f"a space in the path {folder}: set {variable} to one without"


def report_trial(model):
    """After trial steps: print the parameters without a gradient, and the graph breaks."""
    # Experts that no token has chosen so far are among them
    for name, weight in model.named_parameters():
        if weight.requires_grad and weight.grad is None:
            print(f"{name} has no gradient in the trial steps: does it train?")
    for reason in torch._dynamo.utils.counters["unimplemented"]:
        print(f"COMPILE: graph break, {first_line(reason)}; TORCH_LOGS=graph_breaks shows where")


# --------------------------------------
# Attention. A position sees itself and `window` earlier ones


def varlen(q, k, v, window):
    """FlashAttention-2 in the torch wheel, for CUDA from Ampere on, in bfloat16."""
    B, T = q.shape[:2]
    ends = torch.arange(0, B * T + 1, T, dtype=torch.int32, device=q.device)
    q_rows, k_rows, v_rows = (x.flatten(0, 1) for x in (q, k, v))
    return varlen_attn(q_rows, k_rows, v_rows, ends, ends, T, T, window_size=(window, 0)).view(q.shape)


def load_hub_kernel():
    """FlashAttention-3 for A100 and H100, as prepare.py has downloaded it."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    flash_attn_func = load_flash3().flash_attn_func

    def flash3(q, k, v, window):
        y = flash_attn_func(q, k, v, causal=True, window_size=(window, 0))
        if isinstance(y, tuple):  # in some builds, with the log of the sums
            y = y[0]
        return y

    return flash3


def choose_attention(setup, head_dim, query_group):
    """The fastest function that agrees with setup.attention, or that one. Says why a faster one is not used."""
    names = []
    if setup.device.type == "cuda":
        if torch.cuda.get_device_capability(setup.device) in FLASH3_CAPABILITIES:
            names.append("flash3")
        names.append("varlen")
    for name in names:
        try:
            faster = load_hub_kernel() if name == "flash3" else varlen
            compare(torch.compile(faster, dynamic=False, disable=not setup.compiled), setup, head_dim, query_group)
            return faster
        except Exception as error:  # missing, failed, wrong: all the same
            print(f"attention: {name} not used ({type(error).__name__}: {first_line(error)})")
    return setup.attention


def compare(faster, setup, head_dim, query_group):
    """Raises ValueError if value or gradients differ from those of float32 attention by more than FLASH_ERROR."""
    # two heads of keys and values, and the heads of queries that share them
    shapes = [(2, 256, heads, head_dim) for heads in (2 * query_group, 2, 2, 2 * query_group)]
    q, k, v, dy = (torch.randn(shape, device=setup.device).to(setup.dtype).requires_grad_() for shape in shapes)
    for window in (32, 256):
        results = []
        for function, cast in ((faster, setup.dtype), (setup.attention, torch.float32)):
            y = function(q.to(cast), k.to(cast), v.to(cast), window)
            results.append([y, *torch.autograd.grad(y, (q, k, v), dy.to(cast))])
        for found, expected in zip(*results, strict=True):
            error = (found.float() - expected.float()).norm() / expected.float().norm()
            if not error < FLASH_ERROR:  # NaN, too
                raise ValueError(f"differs from the reference by {error:.1%} at window {window}")


# --------------------------------------
# Results


def free_memory():
    """Collect a model that is no longer used: compiled code has reference cycles."""
    gc.collect()
    torch.cuda.empty_cache()


def is_out_of_memory(error):
    return OUT_OF_MEMORY.search(repr(error)) is not None


def summarize(clock, setup, val_bpb, steps, tokens, flops, parameters, depth, batch):
    """
    Print the summary of a scored run, and return it: a dict, in order.

    `flops` and `tokens` are those of the whole training. mfu_percent is 0.00 where the peak of the device is not known.
    """
    peak = PEAK_FLOPS.get(device_name(setup.device), math.inf)
    summary = {
        "val_bpb": f"{val_bpb:.6f}",
        "training_seconds": f"{clock.elapsed:.1f}",
        "total_seconds": f"{clock.total_seconds:.1f}",
        "peak_vram_mb": f"{peak_memory_mb(setup.device):.1f}",
        "mfu_percent": f"{100 * flops / clock.elapsed / peak:.2f}",
        "total_tokens_M": f"{tokens / 1e6:.1f}",
        "num_steps": steps,
        "num_params_M": f"{parameters / 1e6:.1f}",
        "depth": depth,
        "device": device_name(setup.device),
        "benchmark": clock.benchmark.id,
        "seed": clock.benchmark.seed,
        "compiled": setup.compiled,
        "attention": setup.attention.__name__,
        "batch": batch,
        "slow_steps_percent": f"{clock.slow_steps_percent:.1f}",
    }
    print("---")
    for key, value in summary.items():
        print(f"{key + ':':<17} {value}")
    return summary
