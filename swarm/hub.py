"""The results that agents share (program_swarm.md), from git notes."""

import math
import re
import statistics

from harness.journal import git
from swarm.books import LEDGER, scores_of


def read_notes():
    """The results that agents share in git notes (program_swarm.md), oldest first; other lines are left out."""
    lines = (git("grep", "-h", "^time=", "refs/notes/results") or "").splitlines()
    results = []
    for line in sorted(set(lines)):
        keys, *row = line.split("\t", len(LEDGER))
        result = dict(word.split("=", 1) for word in keys.split() if "=" in word) | dict(zip(LEDGER, row, strict=False))
        if {"agent", "benchmark", "device", *LEDGER} <= set(result) and re.fullmatch(r"\d+\.\d+", result["val_bpb"]):
            results.append(result | {"val_bpb": float(result["val_bpb"]) or math.nan})
    return results


def print_hub(benchmark, ledger):
    """The best commits that anybody kept on this benchmark and kind of device, and tries that nobody has a row of."""
    device, notes = git("config", "autoresearch.device"), read_notes()
    shared = [result for result in notes if (result["benchmark"], result["device"]) == (benchmark.id, device)]
    scores, kept = scores_of(shared), {result["commit"]: result for result in shared if result["status"] == "keep"}
    means = {commit: statistics.fmean(scores[commit]) for commit in kept if commit in scores}
    for commit in sorted(means, key=means.get)[:5]:
        words = f"{kept[commit]['agent']}: {kept[commit]['description']}"
        print(f"hub:         {means[commit]:.6f} in {len(scores[commit])} runs, {commit}, {words}")
    listed = {row["commit"] for row in (*ledger, *notes)}
    for line in (git("for-each-ref", "--format=%(refname:lstrip=2) %(subject)", "refs/tries") or "").splitlines():
        if line.split()[0] not in listed:
            print(f"no row yet:  {line}")
