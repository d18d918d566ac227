"""
What ran: the rows that a process has opened, the commit, journal.jsonl and best.pt.

Nothing heavy is imported before it is needed: ledger.py reads the journal beside a training.
"""

import hashlib
import json
import math
import os
import re
import sys
from collections import Counter
from pathlib import Path

from filelock import FileLock

from harness import common
from harness.common import NOT_RECORDED, append_lines, explain, first_line, git, sha256, write_atomically

NAMED_SEEDS = (42, 1, 2, 3, 4, 5)  # the default, and those that a night takes for its own runs
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
# The run

rows_served = Counter()  # of this process, by split, until its run is scored: {"train": 4096}


def map_rows(folder, split):
    """The packed rows of a split, uncounted, for the harness: uint16 [rows, T + 1], memory-mapped, read-only."""
    import numpy as np

    return np.load(folder / f"{split}.npy", mmap_mode="r")


def harness_sha256():
    """One hash of prepare.py and all of harness/."""
    digest = hashlib.sha256()
    for path in (common.ROOT / "prepare.py", *sorted((common.ROOT / "harness").glob("*.py"))):
        digest.update(f"{path.name} {sha256(path)}\n".encode())
    return digest.hexdigest()


def find_origin():
    """
    Where a run comes from: its id (None without a runner), its commit, whether .py files were changed or added since,
    and the hashes of script and harness.
    """
    script = getattr(sys.modules["__main__"], "__file__", None)  # None in a notebook

    # the runner trains a copy of the commit, which is no git repository: it passes the commit's hash
    commit = os.environ.get("AUTORESEARCH_COMMIT")
    dirty = False
    if not commit:
        commit = git("rev-parse", "HEAD").output or None
        changes = git("status", "--porcelain", "--untracked-files=all", "--", "*.py")
        dirty = changes.output != "" if changes.worked else None
    return {
        "run": os.environ.get("AUTORESEARCH_RUN"),
        "commit": commit,
        "dirty": dirty,
        "harness_sha256": harness_sha256(),
        "script": script and Path(script).name,
        "train_sha256": script and sha256(script),
    }


# --------------------------------------
# The journal


def refuse_unwritable(folder):
    """Raise NotRecorded before a training whose score could not be recorded."""
    try:
        write_atomically(folder / "writable", "yes")
        (folder / "writable").unlink(missing_ok=True)  # another run may try at the same moment
    except OSError as error:
        raise NotRecorded(f"cannot write to AUTORESEARCH_HOME: {explain(error)}") from None


class NotRecorded(SystemExit):
    """A score can't be written: prints why. Exits with NOT_RECORDED, so that the ledger runs the commit again."""

    def __init__(self, message):
        super().__init__(NOT_RECORDED)
        self.message = message
        print(message, file=sys.stderr)

    def __str__(self):
        return self.message


def record_run(folder, run, model):
    """
    Append a scored run to the journal of a benchmark's folder. Its weights become best.pt if it beats all runs of its
    harness and that harness prepared the benchmark. Raises NotRecorded, with the score, if it can't write.
    """
    path = folder / "journal.jsonl"
    try:
        with FileLock(path.with_suffix(".lock")):  # runs on other devices may finish at the same moment
            # the best so far, before this one is in the file
            runs = read_journal(folder)
            scores = [other["val_bpb"] for other in runs if other.get("harness_sha256") == run["harness_sha256"]]
            append_lines(path, [run])
            if run["same_harness"] and run["val_bpb"] < min(scores, default=math.inf):
                save_best(folder / "best.pt", run, model)
    except OSError as error:
        score = f"val_bpb {run['val_bpb']:.6f}"
        raise NotRecorded(f"scored, {score}, but not recorded: {explain(error)}") from None


def add_run(folder, run):
    """Append a run that was scored on another machine, unless the journal has it."""
    with FileLock((folder / "journal.jsonl").with_suffix(".lock")):
        if run["run"] not in [other.get("run") for other in read_journal(folder)]:
            append_lines(folder / "journal.jsonl", [run])


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
            print(f"{path}:{number}: skipped, the line is incomplete", file=sys.stderr)
            continue
        runs.append(run)
    return runs


# --------------------------------------
# Flags: they catch accidents and eager agents, not somebody who wants to cheat


def flags(run):
    """Reasons to look at a run of the journal more closely: a list of sentences."""
    found = []
    if run.get("same_harness") is False:
        found.append("the harness was not the one that prepared the benchmark")
    if run.get("dirty") is not False:
        found.append("uncommitted changes, .py files that git does not know, or no git at all")
    if not run.get("run") and run.get("seed") not in NAMED_SEEDS:
        found.append(f"seed {run.get('seed')}, in a run by hand")
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
    if run.get("recompiled"):
        found.append(f"recompiled {run['recompiled']} times while the clock ran: pass what changes as a tensor")
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
