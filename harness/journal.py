"""What ran: commit, device lock, rows, journal.jsonl, best.pt."""

import hashlib
import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from harness.probe import Lazy

torch = Lazy("torch")
ROOT = Path(__file__).parent.parent


def now():
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def sha256(path):
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def open_rows(path, split):
    return np.load(path / f"{split}.npy", mmap_mode="r")


def git(*words):
    """What a git command prints in the folder of this file, or None."""
    try:
        result = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    except OSError:  # not installed
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def find_origin():
    """What is being run: the commit, whether .py files differ from it, and hashes of the script and of this file."""
    changes = git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    script = getattr(sys.modules["__main__"], "__file__", None)
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else changes != "",
        "script": script and Path(script).name,
        "train_sha256": script and sha256(script),
        "prepare_sha256": sha256(ROOT / "prepare.py"),
    }


def lock_device(folder, device):
    """An exclusive lock on this device, by its own name on this machine. A file beside it tells whose it is."""
    name = f"{device.type}-{platform.node()}"
    if device.type == "cuda":
        name = f"cuda-{torch.cuda.get_device_properties(device).uuid}"
    holder = folder / f"{name}.pid"
    lock = FileLock(holder.with_suffix(".lock"))  # the system frees it when the process ends
    try:
        holder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
        holder.write_text(str(os.getpid()))
    except Timeout:
        pid = holder.read_text() if holder.exists() else "unknown"
        raise SystemExit(f"another training is running on {device} (pid {pid}): wait for it or end it") from None
    except OSError as error:
        raise SystemExit(f"cannot write to AUTORESEARCH_HOME: {error}; fix it and run again") from None
    return lock


def save_best(path, model, origin):
    weights = {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}
    try:
        torch.save({**origin, "model": weights}, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
        path.with_suffix(".tmp").unlink(missing_ok=True)
        print(f"best.pt was not saved: {first_line(error)}")


def read_journal(folder):
    """The scored runs of a benchmark's folder, oldest first: a list of dicts."""
    path = folder / "journal.jsonl"
    runs = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines() if path.exists() else [], 1):
        try:
            run = json.loads(line or "null")
            runs += [{"same_prepare": None, **run, "val_bpb": float(run["val_bpb"])}] if line else []
        except (ValueError, KeyError, TypeError):
            print(f"{path}:{number}: skipped, the line is incomplete")
    return runs
