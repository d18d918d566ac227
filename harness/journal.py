"""
What ran: the folder of the device locks, the rows that a process has opened, the commit, journal.jsonl and best.pt.

Nothing heavy is imported before it is needed: ledger.py reads the journal beside a training.
"""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parent.parent  # of the repository
COMPILER = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")  # that torch calls, unless $CXX names another

NAMED_SEEDS = (42, 1, 2, 3, 4, 5)  # the default, and those that program.md names
LATE_FLAG = 1.02  # times the budget: a run that trained for longer is flagged
SLOW_FLAG = 10  # percent of the time in slow steps
SCORING_SHARE, SCORING_SECONDS = 1 / 5, 5  # scoring may take so much of the budget, and so many seconds more

# What a reviewer of a train.py should look at: a regular expression for each
SUSPECTS = {
    "changes the harness": r"\b(prepare|clock|benchmark|journal)\.\w+ *[-+*/|]?=(?!=)|\bsetattr\(",
    "uses private names of the harness": r"\b(prepare|clock|benchmark)\._|\bclock\.(lock|ticks)|(from|import) +harness",
    "starts threads or processes": r"\b(threading|multiprocessing|subprocess|concurrent|fork|popen|system)\b",
    "reads files": r"\bopen\(|\b(torch|np|numpy|pickle)\.load|memmap|from_?file|read_(text|bytes)|safetensors",
    "uses the network": r"\b(socket|urllib|requests|http|huggingface_hub)\b",
    "looks into the interpreter": r"_getframe|\binspect\.|\bgc\.get_",
    "reads or sets the seed": r"env.*AUTORESEARCH_SEED",
}


# --------------------------------------
# Helpers used everywhere


def now():
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def sha256(path):
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def first_line(error):
    """The first line of an exception's text, at most 200 characters."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


def find_home():
    """The folder of all benchmarks, from AUTORESEARCH_HOME. Raises SystemExit if that names no folder."""
    home = os.path.expanduser(os.environ.get("AUTORESEARCH_HOME") or "~/.cache/autoresearch")
    if home.startswith("~"):  # left as it was: there is no such user, or this one has no home
        raise SystemExit(f"{home}: there is no such home folder; set AUTORESEARCH_HOME to a folder on a local disk")
    return Path(home).absolute()


def lock_folder():
    """Where the locks of devices are: one folder for all users of a machine, or for those with the same TMPDIR."""
    return Path(tempfile.gettempdir(), "autoresearch-locks")


def explain(error):
    """An OSError in words, with the way out."""
    return f"{error}; fix it, or set AUTORESEARCH_HOME to another folder on a local disk, and run this again"


def git(*words):
    """The output of a git command in the folder of the repository, or None if it fails."""
    try:
        result = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, errors="replace")
    except OSError:  # not installed
        return None
    if result.returncode != 0:
        return None
    return result.stdout.strip()


# --------------------------------------
# The run

rows_served = Counter()  # of this process, by split, until its run is scored: {"train": 4096}


def open_rows(folder, split):
    """The packed rows of "train", "val" or "holdout", counted: uint16 [rows, T + 1], memory-mapped, read-only."""
    rows = map_rows(folder, split)
    rows_served[split] += len(rows)
    return rows


def map_rows(folder, split):
    """The rows of open_rows, not counted: for the harness itself."""
    import numpy as np

    return np.load(folder / f"{split}.npy", mmap_mode="r")


def harness_sha256():
    """One hash of prepare.py and all of harness/."""
    digest = hashlib.sha256()
    for path in (ROOT / "prepare.py", *sorted((ROOT / "harness").glob("*.py"))):
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()


def find_origin():
    """The code of this run: its commit, whether .py files differ from it or are new, hashes of script and harness."""
    changes = git("status", "--porcelain", "--untracked-files=all", "--", "*.py")
    script = getattr(sys.modules["__main__"], "__file__", None)  # None in a notebook
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": None if changes is None else changes != "",
        "harness_sha256": harness_sha256(),
        "script": script and Path(script).name,
        "train_sha256": script and sha256(script),
    }


# --------------------------------------
# The journal


def refuse_unwritable(folder):
    """Raise SystemExit before a training whose score could not be recorded."""
    trial = folder / f"writable.{os.getpid()}.tmp"
    try:
        trial.write_text("yes")
    except OSError as error:
        raise SystemExit(f"cannot write to AUTORESEARCH_HOME: {explain(error)}") from None
    finally:
        trial.unlink(missing_ok=True)


def record_run(folder, run, model):
    """
    Append a scored run to the journal of a benchmark's folder, and keep its weights as best.pt when no run before was
    better. Runs of another harness are not compared with it. Raises SystemExit, with the score, if it can't write.
    """
    try:
        append_run(folder, run, model)
    except OSError as error:
        raise SystemExit(f"scored, val_bpb {run['val_bpb']:.6f}, but not recorded: {explain(error)}") from None


def append_run(folder, run, model):
    path = folder / "journal.jsonl"
    with FileLock(path.with_suffix(".lock")):  # runs on other devices may finish at the same moment
        # the best so far, before this one is in the file
        runs = read_journal(folder)
        scores = [other["val_bpb"] for other in runs if other.get("harness_sha256") == run["harness_sha256"]]
        line = json.dumps(run) + "\n"
        if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
            line = "\n" + line  # the last one was torn, by a full disk
        with open(path, "a") as journal:
            journal.write(line)
        if run["same_harness"] and run["val_bpb"] < min(scores, default=math.inf):
            save_best(folder / "best.pt", run, model)


def save_best(path, run, model):
    """Write a model's weights and where they come from. A failure only prints a line."""
    import torch

    weights = {name.replace("_orig_mod.", ""): tensor for name, tensor in model.state_dict().items()}
    device = next((weight.device.type for weight in model.parameters()), "cpu")
    best = {"commit": run["commit"], "val_bpb": run["val_bpb"], "device": device, "model": weights}
    temporary = path.with_suffix(".tmp")
    try:
        torch.save(best, temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
        temporary.unlink(missing_ok=True)
        print(f"best.pt was not saved: {first_line(error)}")


def read_journal(folder):
    """The scored runs of a benchmark's folder, oldest first: a list of dicts. Prints and skips torn lines."""
    path = folder / "journal.jsonl"
    text = path.read_text(errors="replace") if path.exists() else ""
    runs = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line:
            continue
        try:
            run = json.loads(line)
            run["val_bpb"] = float(run["val_bpb"])
        except (ValueError, KeyError, TypeError):
            print(f"{path}:{number}: skipped, the line is incomplete")
            continue
        run.setdefault("same_harness", run.get("same_prepare"))  # its name before harness/ was
        runs.append(run)
    return runs


# --------------------------------------
# Flags: they catch accidents and eager agents, not somebody who wants to cheat


def flags(run):
    """Reasons to look at a run of the journal more closely: a list of sentences. Older runs lack some of the keys."""
    found = []
    if run.get("same_harness") is False:
        found.append("the harness was not the one that prepared the benchmark")
    if run.get("dirty") is not False:
        found.append("uncommitted changes, .py files that git does not know, or no git at all")
    if run.get("seed") not in NAMED_SEEDS:
        found.append(f"seed {run.get('seed')}, which program.md does not name")
    if run.get("scored_rows_read"):
        found.append(f"read scored rows (validation or holdout): {run['scored_rows_read']}")
    if run.get("untimed_rows", 0) > 0:
        found.append(f"read {run['untimed_rows']} training rows outside of the timed part")
    if run.get("gpus", 0) > 1:
        found.append(f"used {run['gpus']} GPUs")
    return found + time_flags(run)


def time_flags(run):
    found = []
    budget = run.get("time_budget", math.inf)
    training, scoring = run.get("training_seconds", 0), run.get("scoring_seconds", 0)
    if training > LATE_FLAG * budget:
        found.append(f"trained for {training:.1f} s, budget {budget:g} s")
    if scoring > SCORING_SHARE * budget + SCORING_SECONDS:
        found.append(f"scored for {scoring:.0f} s, over a fifth of the budget and 5 s: was the machine busy?")
    if run.get("slow_steps_percent", 0) > SLOW_FLAG:
        found.append(f"{run['slow_steps_percent']:.0f}% of the time in slow steps")
    return found


def suspects(source):
    """Lines of a train.py that a reader should look at: a list of sentences. Most are harmless."""
    found = []
    for number, line in enumerate(source.splitlines(), 1):
        # comments do nothing
        code = line.split("#")[0].strip()
        for reason, pattern in SUSPECTS.items():
            if re.search(pattern, code):
                found.append(f"train.py:{number} {reason}: {code:.100}")
    return found


def suspects_of_commit(commit):
    """The suspects in the train.py of a commit; none if git does not know it."""
    return suspects(git("show", f"{commit}:./train.py") or "")
