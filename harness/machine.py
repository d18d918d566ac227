"""This machine: devices and their locks, cores, memory, and a kernel that only some GPUs have."""

import contextlib
import ctypes
import os
import platform
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from harness.common import DEVICE_TAKEN, explain, find_home, first_line

# FlashAttention-3 on the kernels hub, and the compute capabilities that it runs on: A100 and H100. On others it calls
# exit(1), which nothing catches
FLASH3 = {"repo_id": "kernels-community/flash-attn3", "revision": "v1"}  # by `version` it is not found offline
FLASH3_CAPABILITIES = ((8, 0), (9, 0))

# Peak FLOP/s in dense bfloat16 (NVIDIA data sheets), by torch's name of the GPU
PEAK_FLOPS = {
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA GeForce RTX 4090": 165.2e12,
}

THREADS = torch.get_num_threads()  # OMP_NUM_THREADS may say less than the machine has; a train.py may change it later

# Files with the quota of a container, microseconds of all cores, and its period: of cgroup v2, and of v1
CPU_QUOTAS = [["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]]
CGROUPS = Path("/sys/fs/cgroup")


class DeviceTaken(SystemExit):
    """Another process trains on the device. Exits with DEVICE_TAKEN, after a line that ends with the lock's path."""

    def __init__(self, device, pid, lock):
        super().__init__(DEVICE_TAKEN)
        self.message = f"another training is running on {device} (pid {pid}): wait for it or end it; lock {lock}"

    def __str__(self):
        return self.message


class DeviceLock:
    """
    The exclusive lock of a device. It is held until release() or until the process ends, whatever ends it.

    One lock per device, for all users and homes: two trainings would halve each other's speed. It is a file in
    lock_folder(), whatever TMPDIR says, and another in the home: a sandbox may hide lock_folder().
    Raises DeviceTaken, naming the other process, if the device is taken.
    """

    def __init__(self, device):
        self.pid = os.getpid()
        self.locks = []

        # the home first: it is the one that has to work
        try:
            self.take(find_home() / "locks", device)
        except OSError as error:
            raise SystemExit(f"cannot lock {device}: {explain(error)}") from None
        try:
            self.take(lock_folder(), device)
        except OSError as error:
            print(f"no lock in {lock_folder()} ({first_line(error)}): runs of another home may use {device} at once")
        except DeviceTaken:
            self.release()
            raise

    def take(self, folder, device):
        """Take the lock in one folder. Raises DeviceTaken or OSError."""
        name = lock_name(device)
        holder = folder / f"{name}.pid"
        lock = FileLock(folder / f"{name}.lock", mode=0o666, thread_local=False)

        # The folder is for all users, whatever the umask says
        if not folder.exists():
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o777)
        try:
            lock.acquire(timeout=1)  # a runner that waits for it takes it for a moment
        except Timeout:
            pid = holder.read_text() if holder.exists() else "unknown"
            taken = DeviceTaken(device, pid, lock.lock_file)
            print(taken, file=sys.stderr)
            raise taken from None
        self.locks.append(lock)

        # The system frees the lock when its process ends, but can't say whose it is: a file beside it has the pid.
        # Another user's file can't be written to, but it can be replaced, since the folder is open to all
        holder.unlink(missing_ok=True)
        holder.write_text(str(self.pid))

    @property
    def held(self):
        """Whether this process holds it; a fork of it does not."""
        return bool(self.locks) and self.pid == os.getpid()

    def release(self):
        if self.held:
            for lock in self.locks:
                lock.release()
            self.locks = []


def lock_folder():
    """
    Where the locks of devices are: one folder for all users of a machine. AUTORESEARCH_LOCKS names another, for tests,
    and for agents that share the cores of a machine.
    """
    named = os.environ.get("AUTORESEARCH_LOCKS")
    if named:
        return Path(named)
    system = Path("/tmp")
    if not system.is_dir():  # Windows
        system = Path(tempfile.gettempdir())
    return system / "autoresearch-locks"


def lock_name(device):
    """The device's name, unique on this machine."""
    if device.type == "cuda":
        return f"cuda-{torch.cuda.get_device_properties(device).uuid}"
    return f"{device.type}-{platform.node()}"


def synchronize(device):
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def device_name(device):
    """The name of a GPU; of a CPU its kind, and on how many of its cores torch computes."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type} {platform.machine()}"
    return f"{device.type} {platform.machine()} x{min(THREADS, usable_cores())}"


def peak_memory_mb(device):
    """Peak device memory; on MPS the memory that is allocated now; on a CPU the peak resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def keep_freed_memory():
    """Let glibc keep what is freed: page faults would slow each step on a CPU."""
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def repair_compiler():
    """
    Two repairs of how torch 2.11 calls the C++ compiler. Both reach into it, so they may fail with another torch.
    """
    from torch._inductor.cpp_builder import BuildOptionsBase
    from torch._inductor.cpu_vec_isa import VecISA

    # trust the processor's flags: torch would compile a program for each instruction set, 5 s each
    def check_build(isa, code):
        return True

    # it does not quote the folders of libraries: with a space in the path of .venv nothing would compile
    def get_libraries_dirs(options):
        return [shlex.quote(folder) for folder in options._libraries_dirs]

    VecISA.check_build = check_build
    BuildOptionsBase.get_libraries_dirs = get_libraries_dirs


def why_no_gpu():
    """Why torch does not see the NVIDIA GPU of this machine; None if it seems to have none."""
    if not shutil.which("nvidia-smi"):
        return None
    reason = "has no CUDA (pip's default on Windows); pytorch.org names a wheel that has"
    if torch.version.cuda:
        reason = (
            f"finds no GPU: hidden (sandbox, CUDA_VISIBLE_DEVICES) or with a driver before CUDA {torch.version.cuda}"
        )
    return f"torch {torch.__version__} {reason}"


def refuse_old_gpu():
    """Raise SystemExit, before anything is downloaded, for a GPU that this torch has no code for."""
    gpu = torch.cuda.get_device_properties(0)
    architectures = [int(re.sub(r"\D", "", name)) for name in torch.cuda.get_arch_list() if "sm_" in name]
    if 10 * gpu.major + gpu.minor < min(architectures, default=0):
        way_out = "take a wheel that has (see pytorch.org), or the CPU (CUDA_VISIBLE_DEVICES= before every command)"
        raise SystemExit(f"torch {torch.__version__} has no code for a {gpu.name}: {way_out}")


def load_flash3():
    """FlashAttention-3 from the kernels hub, which prepare.py downloads and train.py takes."""
    from kernels import get_kernel

    return get_kernel(**FLASH3)


def fetch_flash3():
    """Download FlashAttention-3 if this GPU can run it: train.py itself uses no network."""
    if torch.cuda.is_available() and torch.cuda.get_device_capability() in FLASH3_CAPABILITIES:
        try:
            load_flash3()
        except Exception as error:  # no network, no build for this torch or system, moved: all the same
            print(f"no FlashAttention-3, train.py will take torch's own attention ({first_line(error)})")


def usable_cores():
    """Cores that this process may use: those of taskset or Slurm, and no more than the quota of a container."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows
        cores = os.cpu_count() or 1

    # "max" and -1 are no quota
    for names in CPU_QUOTAS:
        with contextlib.suppress(OSError, ValueError):
            quota, period = " ".join((CGROUPS / name).read_text() for name in names).split()
            if int(quota) > 0:
                cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores
