"""The books of waves and hubs (program_swarm.md), where rows are typed by hand: `uv run python -m swarm.books`."""

import csv
import itertools
import math
import re
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path

from harness.journal import SLOW_FLAG, flags, git, read_journal

LEDGER = ("commit", "val_bpb", "memory_gb", "status", "description")
CRASH = "0.000000\t0.0\tcrash"  # these columns of a run without a score
PROMISING = 1 / 4  # of the noise floor: what a first run must gain to be repeated ...
KEEP = 1 / 2  # ... and what the runs after it must gain
SEEDS = (1, 2, 3, 4, 5)  # that program.md names, three for the baseline
SLOW_RUN = 0.5  # of the most steps that a run of the same commit has made


def read_ledger(path="results.tsv"):
    """
    One dict a run, a crash without val_bpb (NaN). Takes ledgers of other tools, too: missing columns, commas instead of
    tabs, decimal commas, any case.
    """
    text = Path(path).read_text(errors="replace") if Path(path).exists() else ""
    header, *lines = [line for line in text.splitlines() if line.strip()] or [""]
    tabs = header.count("\t")
    split = (lambda line: line.split("\t", tabs)) if tabs else (lambda line: next(csv.reader([line])))
    names = [name.strip().lower() for name in split(header)] if header else []
    rows = []
    for line in lines:
        row = dict.fromkeys(LEDGER, "") | dict(zip(names, map(str.strip, split(line)), strict=False))
        row["status"] = row["status"].lower()
        for name in ("val_bpb", "memory_gb"):
            number = row[name].replace(",", ".")
            number = float(number) if re.fullmatch(r"\d*\.?\d+(e-?\d+)?", number) else 0.0
            row[name] = number if 0 < number < math.inf else math.nan
        row["val_bpb"] = math.nan if row["status"] == "crash" else row["val_bpb"]
        rows.append({name: row[name] for name in LEDGER})
    return rows


def scores_of(ledger):
    """The scores of every commit, in order: {commit: [val_bpb]}."""
    scores = {}
    for row in ledger:
        if row["commit"] and not math.isnan(row["val_bpb"]):
            scores.setdefault(row["commit"], []).append(row["val_bpb"])
    return scores


def noise_floor(scores):
    """Twice the standard deviation between runs of one commit, pooled over all commits; NaN if none ran twice."""
    repeats = sum(len(runs) - 1 for runs in scores.values())
    squares = sum((score - statistics.fmean(runs)) ** 2 for runs in scores.values() for score in runs)
    return 2 * math.sqrt(squares / repeats) if repeats else math.nan


def worth(commit, scores):
    """The mean of a commit's runs."""
    return statistics.fmean(scores[commit])


def gain(commit, best, scores):
    """How far below the best a commit is, by the runs that decide: not the first, which selected it, if it has more."""
    runs = scores[commit]
    return worth(best, scores) - statistics.fmean(runs[1:] if len(runs) > 1 and commit != best else runs)


def verdict(commit, best, scores):
    """What the runs of a commit say about it, against those of the last keep: keep, discard or repeat."""
    gained, floor = gain(commit, best, scores), noise_floor(scores)
    floor = 0.0 if math.isnan(floor) else floor
    if len(scores[commit]) == 1:
        return "repeat" if gained > PROMISING * floor else "discard"
    return "keep" if gained > KEEP * floor else "discard"


def match_runs(ledger, journal, since=""):
    """
    Which runs of the journal have a row, {number of the row: run}, and which have none: those after the first match, or
    else after `since`. (An earlier night may have begun at the same commit.)
    """
    matched, rest = {}, sorted(journal, key=lambda run: run["time"])
    for number, row in enumerate(ledger):
        for run in rest:
            same = row["commit"] and str(run["commit"]).startswith(row["commit"])
            if same and abs(run["val_bpb"] - row["val_bpb"]) < 1e-6:
                matched[number] = run
                rest = [other for other in rest if other is not run]
                break
    since = min((run["time"] for run in matched.values()), default=since)
    return matched, [run for run in rest if run["time"] >= since]


def fallbacks(path="run.log"):
    """The lines of a log in which train.py says what did not work or does not train."""
    log = Path(path).read_text(errors="replace") if Path(path).exists() else ""
    said = r"^(?:CPU|COMPILE|DEVICE_BATCH_SIZE): .*|^attention: \w+ not used.*|^\S+ has no gradient.*"
    return re.findall(said, log, re.M)


def sparkline(values, width=60):
    """Values as one line of block characters, at most `width` of them."""
    width = min(width, len(values))
    values = [values[len(values) * (part + 1) // width - 1] for part in range(width)]
    low, span = min(values), max(values) - min(values)
    return "".join("▁▂▃▄▅▆▇█"[round(7 * (value - low) / span) if span else 0] for value in values)


def print_status(benchmark):
    """Where the night stands, from results.tsv in this folder, the journal and git, and what program.md says next."""
    from swarm import hub, wave  # which import this

    ledger, path = read_ledger(), Path("results.tsv")
    created = datetime.fromtimestamp(path.stat().st_mtime if path.exists() else time.time(), timezone.utc)
    journal = read_journal(benchmark.path)
    matched, unlisted = match_runs(ledger, journal, created.isoformat(timespec="seconds"))
    head = (git("rev-parse", "HEAD") or "no git")[:7]
    rows = [row for row in ledger if row["commit"] == head]
    new = [run for run in unlisted if str(run["commit"]).startswith(head) and not run.get("dirty")]
    listed = [id(run) for number, run in matched.items() if ledger[number]["commit"] == head]
    runs = [run for run in journal if run in new or id(run) in listed]
    most = max((run.get("steps", 0) for run in runs), default=0)
    slow = [run for run in new if run.get("slow_steps_percent", 0) > SLOW_FLAG or run.get("steps", 0) < SLOW_RUN * most]
    counted = [run for run in new if run not in slow]
    scores = scores_of([*ledger, *({"commit": head, "val_bpb": run["val_bpb"]} for run in counted)])
    keeps = [row["commit"] if row["status"] == "keep" and row["commit"] in scores else None for row in ledger]
    kept = list(dict.fromkeys(filter(None, keeps)))
    best, floor = kept[-1] if kept else head, noise_floor(scores)

    print(f"benchmark:   {benchmark.id}, {benchmark.time_budget:g} s a run, {len(ledger)} rows")
    limits = f"; promising from {PROMISING * floor:.6f}, keep from {KEEP * floor:.6f}"
    print(f"noise floor: {floor:.6f}{limits}" if floor > 0 else "noise floor: unknown, no commit ran twice")
    if len(kept) > 1:
        low = itertools.accumulate((worth(commit, scores) if commit else math.inf for commit in keeps), min)
        low = [score for score in low if score < math.inf]
        print(f"best so far: {sparkline(low)} {low[0]:.4f} to {low[-1]:.4f}")
    if kept:
        print(f"to beat:     {worth(best, scores):.6f}, {best}")
    for run in (run for number, run in matched.items() if ledger[number]["commit"] == best != head):
        print(f"  {run['val_bpb']:.6f} seed {run['seed']}, {run.get('steps', 0):,} steps")
    branch = git("branch", "--show-current") or "no branch"
    print(f"this commit: {head} on {branch}" + ", the one to beat" * (head == best))
    for run in runs:
        gained = f", gain {worth(best, scores) - run['val_bpb']:.6f}" if head not in kept and kept else ""
        state = ", does not count" if run in slow else ", no row yet" if run in new else ""
        print(f"  {run['val_bpb']:.6f} seed {run['seed']}, {run.get('steps', 0):,} steps{gained}{state}")
        for words in flags(run):
            print(f"  warning: {words}")
    for line in fallbacks():
        print(f"  warning: run.log: {line}")
    wave.print_wave(benchmark, ledger, kept or [head])
    hub.print_hub(benchmark, ledger)
    for row in ledger[-10:]:
        print(f"  {row['commit']} {row['val_bpb']:.6f} {row['status']:<7} {row['description']:.100}")

    what = "keep" if head in (best, *kept) else verdict(head, best, scores) if head in scores else "crash"
    seeds = [run["seed"] for run in runs if run not in slow]
    crashed = any(row["status"] == "crash" for row in rows)
    enough = crashed or len(scores.get(head, [])) > 2
    seed = next((seed for seed in SEEDS[:3] if seed not in seeds and not enough), None)
    if counted:
        memory, status = counted[0]["peak_memory_mb"] / 1024, what.replace("repeat", "discard (promising)")
        print(f"next: write the row: {head} {counted[0]['val_bpb']:.6f} {memory:.1f} {status}")
    elif len(slow) > 2 and not crashed:
        print(f"next: disturbed three times, give it up: write the row: {head} 0.000000 0.0 crash")
    elif slow and runs[-1] is slow[-1] and not crashed:
        print(f"next: disturbed, is the machine idle? Run it again with seed {slow[-1]['seed']}")
    elif len(scores) < 2 and head == best and seed:
        print(f"next: run the baseline with seed {seed}")
    elif not rows and head != best:
        print(f"next: run it with seed {seed}; if it has crashed write the row: {head} 0.000000 0.0 crash")
    elif what == "repeat" and seed:
        print(f"next: promising, run it with seed {seed}")
    elif head in kept and head != best:
        print(f"next: go back to {best}, the branch")
    elif what != "keep":
        print(f"next: store it as refs/tries/{head}, reset to {best}")
    elif len(ledger) > 20 and kept[0] not in [row["commit"] for row in ledger[-20:]]:
        print(f"next: run the baseline, {kept[0]}, once more, to see drift; then a new idea, before <until>")
    else:
        print("next: a new idea, before <until>")


if __name__ == "__main__":
    import prepare

    print_status(prepare.load_benchmark())
