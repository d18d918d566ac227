"""The runs of a wave (program_swarm.md), from its logs."""

import math
import re
from collections import defaultdict
from pathlib import Path

from harness.journal import git
from swarm.books import CRASH, gain, scores_of, verdict


def read_logs(benchmark):
    """The runs of a wave, from its logs wave/<tag>-<commit>-<seed>.log; val_bpb is NaN where there is no score."""
    runs = []
    for path in sorted(Path("wave").glob("*-*-*.log")):
        name = re.search(r"-([0-9a-z]{7})-(\d+)(?:-\d+)?$", path.stem)
        if not name:
            continue
        summary = defaultdict(str, re.findall(r"^(\w+): +(.*)", path.read_text(errors="replace"), re.M))
        score = float(summary["val_bpb"] or "nan") if summary["benchmark"] == benchmark.id else math.nan
        run = {"id": path.stem, "commit": name[1], "seed": int(name[2]), "val_bpb": score}
        run |= {"device": summary["device"] or "unknown", "steps": summary["num_steps"] or "no"}
        runs.append(run | {"memory": float(summary["peak_vram_mb"] or 0) / 1024})
    return runs


def print_wave(benchmark, ledger, kept):
    """
    What the logs of a wave are worth against the last of the commits that were kept (the first is the baseline), and a
    line `row` for each log that has none yet, as results.tsv takes it.
    """
    base, best, logs = kept[0], kept[-1], sorted(read_logs(benchmark), key=lambda run: run["seed"])
    device = next((run["device"] for run in logs if run["commit"] == base and run["val_bpb"] > 0), None)
    new = [run for run in logs if not any(f"[{run['id']} on " in row["description"] for row in ledger)]
    if new and device is None:
        return print(f"wave:        no log has a score of {base}, the baseline: submit it")
    for run in [run for run in new if run["val_bpb"] > 0 and run["device"] != device]:
        print(f"wave:        {run['id']} ran on {run['device']}, not on {device}: does not compare")
        new.remove(run)
    scores = scores_of([*ledger, *new])

    def rank(commit):
        return commit != base, -gain(commit, best, scores) if commit in scores else math.inf

    for commit in sorted({run["commit"] for run in new}, key=rank):
        what = "keep" if commit in kept else verdict(commit, best, scores) if commit in scores else "crash"
        if commit in scores:
            gained, count = gain(commit, best, scores), len(scores[commit])
            advice = what.replace("repeat", "promising, submit seeds 2 and 3")
            print(f"wave:        {commit} gains {gained:.6f} in {count} runs: {advice}")
        for run in (run for run in new if run["commit"] == commit):
            words = "baseline" if commit == base else git("log", "-1", "--format=%s", commit)
            words = f"{words}, seed {run['seed']}, {run['steps']} steps [{run['id']} on {run['device']}]"
            row = f"{run['val_bpb']:.6f}\t{run['memory']:.1f}\t{what.replace('repeat', 'discard')}"
            print(f"row\t{commit}\t{row if run['val_bpb'] > 0 else CRASH}\t{words}")
