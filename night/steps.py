"""The commands that come next, with the reason for each."""

import re
from collections import namedtuple

from night.worth import FINAL_SEEDS, is_over, kept_commits, new_runs

WAVE = "uv run --group cluster swarm/wave.py"
NEW_IDEA = "# a new idea: edit train.py"
DROP = "git checkout HEAD -- train.py"

Step = namedtuple("Step", ["command", "reason"])


def run_step(night, seed, reason):
    """Train HEAD with this seed: here, or on the cluster of a wave."""
    # cut off: the log is of this run and has no error, and the journal has no score
    scored = [run["seed"] for run in night.runs if run["commit"][:7] == night.head]
    if night.log == {"commit": night.head, "seed": seed, "reason": ""} and seed not in scored:
        reason += "; its last run was cut off (if memory ran out, add it with --crash)"
    if night.wave:
        return submit_step([(night.head, seed)], reason)
    return Step(f"AUTORESEARCH_SEED={seed} uv run train.py > run.log 2>&1", reason)


def submit_step(pairs, reason):
    """Send runs, [(commit, seed)], to the cluster of the wave."""
    return Step(f"{WAVE} submit " + " ".join(f"{commit}:{seed}" for commit, seed in pairs), reason)


def add_step(night, reason):
    return Step(f"uv run ledger.py add '{describe(night)}'", reason)


def go_to(commit, night, reason):
    """Check out the baseline, detached, or else the branch."""
    if commit == night.start:
        return Step(f"git checkout -q --detach {commit}", reason)
    return Step(f"git checkout -q autoresearch/{night.tag}", reason)


def describe(night):
    """The description of the next row, if the agent gives none."""
    seeds = [run["seed"] for run in new_runs(night)[0]] or [night.log.get("seed")]
    ending = ""
    if is_over(night) and seeds[0] in FINAL_SEEDS:
        ending = ", final"

    # the two commits of the end have names that a reader of the ledger knows
    if night.head == night.start:
        return f"baseline{ending}"
    if ending and night.head == kept_commits(night)[-1]:
        return "last keep, final"

    # printable ASCII without single quotes, and not like an option
    subject = re.sub(r"[^ -&(-~]+", " ", night.subject).strip(" -")
    return subject or "no subject"
